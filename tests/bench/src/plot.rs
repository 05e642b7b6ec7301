//! Line charts, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// Lines over one quantity.
#[derive(Clone, Debug)]
pub(crate) struct Chart {
    /// Of the file.
    pub(crate) name: String,
    /// Above it.
    pub(crate) title: String,
    /// What is varied.
    pub(crate) x: &'static str,
    /// What is measured.
    pub(crate) y: &'static str,
    /// Name and points of each line; both coordinates are above zero.
    pub(crate) lines: Vec<(String, Vec<(f64, f64)>)>,
}

const SIZE: (u32, u32) = (800, 480);

/// Draws a chart with logarithmic axes, on which linear growth is a straight line of slope one.
pub(crate) fn draw(chart: &Chart, path: &Path) -> Result<()> {
    let points = chart.lines.iter().flat_map(|(_, points)| points);
    let [mut x, mut y] = [(f64::MAX, f64::MIN_POSITIVE); 2];
    for point in points {
        x = (x.0.min(point.0), x.1.max(point.0));
        y = (y.0.min(point.1), y.1.max(point.1));
    }
    if x.0 > x.1 || y.0 > y.1 {
        return Ok(());
    }
    render(chart, path, x, (y.0 / 2.0, y.1 * 2.0)).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn render(chart: &Chart, path: &Path, x: (f64, f64), y: (f64, f64)) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut context = ChartBuilder::on(&area)
        .caption(&chart.title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(84)
        .build_cartesian_2d((x.0..x.1 * 1.01).log_scale(), (y.0..y.1).log_scale())?;
    context.configure_mesh().x_desc(chart.x).y_desc(chart.y).draw()?;
    for (index, (name, points)) in chart.lines.iter().enumerate() {
        let style = Palette99::pick(index).stroke_width(2);
        context
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(4))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    context.configure_series_labels().border_style(BLACK).background_style(WHITE.mix(0.8)).draw()?;
    area.present()?;
    Ok(())
}
