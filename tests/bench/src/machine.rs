//! What was measured on and with.

use std::fs;
use std::process::Command;

/// Pairs of name and value, in the order in which they are shown.
pub(crate) fn describe() -> Vec<(String, String)> {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default();
    let rows = [
        ("CPU", model.unwrap_or("unknown").to_owned()),
        ("cores", crate::process::cores().to_string()),
        ("memory", format!("{} MiB", total.parse::<u64>().unwrap_or_default() / 1024)),
        ("kernel", kernel.trim().to_owned()),
        ("load before", load.split_whitespace().take(3).collect::<Vec<_>>().join(" ")),
        ("elasti", env!("CARGO_PKG_VERSION").to_owned()),
        ("haproxy", first_line("haproxy", "-v")),
        ("nginx", first_line("nginx", "-v")),
        ("wrk", first_line("wrk", "-v")),
    ];
    rows.map(|(name, value)| (name.to_owned(), value)).into()
}

/// The first line that a program prints, wherever it prints it; empty without the program.
fn first_line(program: &str, flag: &str) -> String {
    let Ok(output) = Command::new(program).arg(flag).output() else { return String::new() };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned()
}
