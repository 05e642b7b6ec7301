//! What was measured, against what is wanted: tables for people, JSON for programs, plots.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::plot::{self, Chart};

/// What one contender did in one case.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// What was done.
    pub(crate) case: String,
    /// Who did it.
    pub(crate) contender: String,
    /// Of the values.
    pub(crate) unit: &'static str,
    /// One for each run.
    pub(crate) values: Vec<f64>,
}

/// What a figure must be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Wanted {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

/// A figure that decides, and what it was: the median of several.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Goal {
    /// Of what.
    pub(crate) figure: String,
    /// Of the values.
    pub(crate) unit: &'static str,
    /// What it must be.
    pub(crate) wanted: Wanted,
    /// One for each run; none is a goal that could not be measured here, which is missed.
    pub(crate) values: Vec<f64>,
}

/// The result of a suite.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Outcome {
    /// Everything that was measured.
    pub(crate) rows: Vec<Row>,
    /// What decides.
    pub(crate) goals: Vec<Goal>,
    /// What a reader has to know.
    pub(crate) notes: Vec<String>,
    /// To be drawn.
    #[serde(skip)]
    pub(crate) charts: Vec<Chart>,
    /// Drawn already: name and SVG.
    #[serde(skip)]
    pub(crate) pictures: Vec<(&'static str, String)>,
}

/// Smallest, middle and largest of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    /// The smallest.
    pub(crate) min: f64,
    /// The middle; of an even number, the mean of the two in the middle.
    pub(crate) median: f64,
    /// The largest.
    pub(crate) max: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Some(Self { min, median, max })
    }
}

impl Goal {
    /// Whether the median is as wanted.
    pub(crate) fn is_met(&self) -> bool {
        Spread::of(&self.values).is_some_and(|spread| match self.wanted {
            Wanted::AtLeast(bound) => spread.median >= bound,
            Wanted::AtMost(bound) => spread.median <= bound,
        })
    }
}

/// Everything that one call of the command has measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Vec<(String, String)>,
    /// Whether the runs were too short to decide anything.
    short: bool,
    suites: Vec<(&'static str, Outcome)>,
}

impl Report {
    /// Nothing measured yet, on this machine.
    pub(crate) fn new(machine: Vec<(String, String)>, short: bool) -> Self {
        Self { machine, short, suites: vec![] }
    }

    /// Takes the result of a suite.
    pub(crate) fn add(&mut self, suite: &'static str, outcome: Outcome) {
        self.suites.push((suite, outcome));
    }

    /// Whether a goal is missed.
    pub(crate) fn is_missed(&self) -> bool {
        self.suites.iter().flat_map(|(_, outcome)| &outcome.goals).any(|goal| !goal.is_met())
    }

    /// Prints the tables and writes `bench.md`, `bench.json` and one SVG for each chart.
    #[expect(clippy::print_stdout, reason = "the tables are the command's output")]
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let markdown = self.markdown();
        println!("{markdown}");
        fs::write(directory.join("bench.md"), markdown)?;
        fs::write(directory.join("bench.json"), serde_json::to_vec_pretty(self)?)?;
        for (_, outcome) in &self.suites {
            for (name, picture) in &outcome.pictures {
                fs::write(directory.join(format!("{name}.svg")), picture)?;
            }
            for chart in &outcome.charts {
                plot::draw(chart, &directory.join(format!("{}.svg", chart.name)))?;
            }
        }
        Ok(())
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _written = self.write_markdown(&mut text);
        text
    }

    fn write_markdown(&self, to: &mut String) -> std::fmt::Result {
        writeln!(to, "| machine | |\n|---|---|")?;
        for (name, value) in &self.machine {
            writeln!(to, "| {name} | {value} |")?;
        }
        if self.short {
            writeln!(to, "\nShort runs: they decide nothing.")?;
        }
        for (suite, outcome) in &self.suites {
            writeln!(to, "\n### {suite}\n")?;
            for note in &outcome.notes {
                writeln!(to, "{note}\n")?;
            }
            writeln!(to, "| case | contender | n | min | median | max | |\n|---|---|---:|---:|---:|---:|---|")?;
            for Row { case, contender, unit, values } in &outcome.rows {
                let spread = Spread::of(values).unwrap_or(Spread { min: f64::NAN, median: f64::NAN, max: f64::NAN });
                let [min, median, max] = [spread.min, spread.median, spread.max].map(digits);
                writeln!(to, "| {case} | {contender} | {} | {min} | {median} | {max} | {unit} |", values.len())?;
            }
            if outcome.goals.is_empty() {
                continue;
            }
            writeln!(to, "\n| figure | goal | median | min to max | met |\n|---|---:|---:|---:|---|")?;
            for goal in &outcome.goals {
                let Goal { figure, unit, wanted, values } = goal;
                let wanted = match wanted {
                    Wanted::AtLeast(bound) => format!("≥ {}", digits(*bound)),
                    Wanted::AtMost(bound) => format!("≤ {}", digits(*bound)),
                };
                let (median, range) = Spread::of(values).map_or(("not measured".into(), String::new()), |spread| {
                    (digits(spread.median), format!("{} to {}", digits(spread.min), digits(spread.max)))
                });
                let met = if goal.is_met() { "yes" } else { "**no**" };
                writeln!(to, "| {figure} | {wanted} {unit} | {median} | {range} | {met} |")?;
            }
        }
        Ok(())
    }
}

/// Three significant digits or the whole number, whichever is longer.
fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(wanted: Wanted, values: &[f64]) -> Goal {
        Goal { figure: "f".into(), unit: "", wanted, values: values.into() }
    }

    #[test]
    fn the_median_decides_and_what_was_not_measured_is_missed() {
        assert!(goal(Wanted::AtLeast(1.0), &[0.1, 1.0, 9.0]).is_met());
        assert!(!goal(Wanted::AtLeast(1.0), &[0.9, 0.9, 9.0]).is_met());
        assert!(goal(Wanted::AtMost(1.0), &[0.9, 0.9, 9.0]).is_met());
        assert!(!goal(Wanted::AtMost(1.0), &[]).is_met());
    }

    #[test]
    fn a_spread_of_an_even_number_has_its_median_between_the_two() {
        assert_eq!(Spread::of(&[4.0, 1.0, 3.0, 2.0]), Some(Spread { min: 1.0, median: 2.5, max: 4.0 }));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn a_report_names_what_is_missed() {
        let mut report = Report::new(vec![("cores".into(), "2".into())], false);
        let row = Row { case: "c".into(), contender: "elasti".into(), unit: "µs", values: vec![1234.5, 0.5] };
        let goals = vec![goal(Wanted::AtMost(1.0), &[2.0])];
        report.add("proxy", Outcome { rows: vec![row], goals, ..Outcome::default() });
        assert!(report.is_missed());
        let text = report.markdown();
        assert!(text.contains("| c | elasti | 2 | 0.500 | 618 | 1234 | µs |"), "{text}");
        assert!(text.contains("| f | ≤ 1.00  | 2.00 | 2.00 to 2.00 | **no** |"), "{text}");
    }
}
