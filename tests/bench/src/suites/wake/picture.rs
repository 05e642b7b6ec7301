//! The phases of a wake as a picture: one box each, with how long it took and whose time it is. Not to scale, since Elasti's are
//! a hundred times shorter than the pod's.

use std::fmt::Write as _;

/// Whose time a phase is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// The resolver's or the operator's.
    Elasti,
    /// The control plane's and kubelet's.
    Kubernetes,
    /// The pod's own.
    Pod,
}

impl Whose {
    fn fill(self) -> &'static str {
        match self {
            Self::Elasti => "#2e8b57",
            Self::Kubernetes => "#5b7fb5",
            Self::Pod => "#8a8a8a",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Elasti => "Elasti",
            Self::Kubernetes => "Kubernetes",
            Self::Pod => "the pod",
        }
    }
}

/// A phase: what ends it, whose it is, and how long it took, in ms.
pub(super) type Phase = (&'static str, Whose, f64);

const WIDTH: usize = 118;
const HEIGHT: usize = 64;
const MARGIN: usize = 12;

/// Rows of phases, each with a title, as SVG.
pub(super) fn draw(rows: &[(String, Vec<Phase>)]) -> String {
    let most = rows.iter().map(|(_, phases)| phases.len()).max().unwrap_or_default();
    let row_height = HEIGHT + 36;
    let (width, height) = (most * WIDTH + 2 * MARGIN, rows.len() * row_height + 36);
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">"#
    );
    svg.push_str(r##"<rect width="100%" height="100%" fill="#ffffff"/>"##);
    for (row, (title, phases)) in rows.iter().enumerate() {
        let top = row * row_height + MARGIN;
        text(&mut svg, (MARGIN, top + 14), "#000000", title);
        for (column, (ends_with, whose, took)) in phases.iter().enumerate() {
            let (left, top) = (MARGIN + column * WIDTH, top + 22);
            // Writing to a String cannot fail.
            let _written = write!(
                svg,
                r#"<rect x="{left}" y="{top}" width="{}" height="{HEIGHT}" rx="4" fill="{}"/>"#,
                WIDTH - 6,
                whose.fill()
            );
            for (line, words) in lines(ends_with).into_iter().enumerate() {
                text(&mut svg, (left + 6, top + 16 + 14 * line), "#ffffff", &words);
            }
            text(&mut svg, (left + 6, top + HEIGHT - 8), "#ffffff", &milliseconds(*took));
        }
    }
    for (index, whose) in [Whose::Elasti, Whose::Kubernetes, Whose::Pod].into_iter().enumerate() {
        text(&mut svg, (MARGIN + index * 110, height - 12), whose.fill(), &format!("■ {}", whose.name()));
    }
    svg.push_str("</svg>\n");
    svg
}

fn text(svg: &mut String, (x, y): (usize, usize), fill: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _written = write!(svg, r#"<text x="{x}" y="{y}" fill="{fill}">{text}</text>"#);
}

/// At most two lines that fit into a box.
fn lines(text: &str) -> Vec<String> {
    const FITS: usize = 17;
    let mut lines: Vec<String> = vec![String::new()];
    for word in text.split(' ') {
        if let Some(line) = lines.last_mut().filter(|line| line.is_empty() || line.len() + word.len() < FITS) {
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

fn milliseconds(took: f64) -> String {
    if took < 10.0 { format!("{took:.2} ms") } else { format!("{took:.0} ms") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_says_what_ends_it_and_how_long_it_took() {
        let svg =
            draw(&[("a < b".to_owned(), vec![("patch sent", Whose::Elasti, 0.5), ("ready", Whose::Pod, 1234.5)])]);
        for part in ["a &lt; b", ">patch sent<", ">0.50 ms<", ">1234 ms<", Whose::Pod.fill()] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert_eq!(lines("the pod can be reached"), ["the pod can be", "reached"]);
    }
}
