//! `docs/kubeelasti-defects.md` has all defects of KubeElasti, each with tests that exist, of which one names it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use elasti_tests::monitoring::file;

/// Defects of which nothing can be shown by one test; the table says why.
const UNTESTED: [&str; 2] = ["B39", "B44"];

/// The text of all Rust files below a directory.
fn sources(directory: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all += &fs::read_to_string(path).unwrap();
        }
    }
    all
}

/// The words of a text in code font that could be names of tests.
fn names(text: &str) -> impl Iterator<Item = &str> {
    let code = text.split('`').skip(1).step_by(2);
    code.filter(|word| word.matches('_').count() > 1 && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

#[test]
fn every_defect_has_tests_and_one_that_names_it() {
    let sources: String = ["operator", "resolver", "tests"].iter().map(|part| sources(&file(part))).collect();
    let table = fs::read_to_string(file("docs/kubeelasti-defects.md")).unwrap();
    let rows: Vec<(&str, &str)> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" | "))
        .filter(|(defect, _)| defect.starts_with('B'))
        .collect();
    let numbers: Vec<String> = (1..=48).map(|number| format!("B{number}")).collect();
    assert_eq!(rows.iter().map(|(defect, _)| *defect).collect::<Vec<_>>(), numbers);
    for (defect, row) in rows {
        let mut named = false;
        for name in names(row) {
            let function = sources.find(&format!("fn {name}("));
            let function = function.unwrap_or_else(|| panic!("{defect} names {name}, which is nowhere"));
            // The lines above it: attributes and comment.
            let above = sources[..function].rfind("\n\n").map_or("", |blank| &sources[blank..function]);
            let words: Vec<&str> = above.split(|c: char| !c.is_ascii_alphanumeric()).collect();
            named |= words.contains(&defect) || name.starts_with(&format!("{}_", defect.to_lowercase()));
        }
        assert_ne!(named, UNTESTED.contains(&defect), "{defect}: a test of the table names it in its comment or name");
    }
}
