//! No request is lost while Services go to zero and come again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "its report is its purpose")]

use std::time::Duration;

use elasti_tests::cluster::kubectl;
use elasti_tests::cycles::cycle::Plan;
use elasti_tests::cycles::report::{Count, Report, not_more};
use elasti_tests::cycles::run::{PROGRAMS, Program, Run};
use elasti_tests::cycles::timeline::Window;

/// Each window must have been put to the proof by at least so many requests, if there are cycles enough to aim at each.
const ARRIVALS_MIN: u64 = 30;

fn setting(name: &str) -> String {
    std::env::var(name).expect("run this by `cargo xtask test --only cycles`")
}

fn number(name: &str) -> usize {
    setting(name).parse().expect("a number")
}

/// Sets the environment of a workload of the product and waits for its rollout.
fn configure(workload: &str, variable: &str) {
    let namespace = elasti_api::names::NAMESPACE;
    kubectl(&["-n", namespace, "set", "env", workload, variable]);
    kubectl(&["-n", namespace, "rollout", "status", workload, "--timeout=180s"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_while_services_go_to_zero_and_come_again() {
    let hosts: Vec<Vec<String>> = serde_json::from_str(&setting("ELASTI_HOST_CLIENTS")).unwrap();
    // Cooldowns are short here, so triggers are asked often.
    configure("deployment/elasti-operator", "POLLING_INTERVAL=1s");
    let redirects = setting("ELASTI_EBPF") != "off";
    if !redirects {
        configure("daemonset/elasti-resolver", "ELASTI_EBPF=off");
    }
    let cooldown = Duration::from_secs(setting("ELASTI_CYCLES_COOLDOWN").parse().expect("seconds"));
    let run = Run::new(&hosts, cooldown).await;
    let services = run.services(number("ELASTI_CYCLES_SERVICES"), true).await;
    let controls = run.services(PROGRAMS.len().min(services.len()), false).await;
    let cycles = number("ELASTI_CYCLES");
    let control_cycles = (cycles / services.len() / 2).max(2);
    let plan = (&services[..], cycles, number("ELASTI_CYCLES_FIRST"));
    let (report, control) = run.cycles(plan, (&controls[..], control_cycles)).await;
    let (path, name) = (setting("ELASTI_CYCLES_REPORT"), setting("ELASTI_CYCLES_NAME"));
    std::fs::write(&path, report.json(&name, &control)).unwrap();
    println!("{name}\n{}\n\nwithout Elasti\n{}", report.table(), control.table());
    for failure in report.failures().iter().take(10) {
        println!("{failure}\n");
    }
    for program in PROGRAMS {
        compare(program, &report, &control, redirects);
    }
    if cycles < Plan::COUNT {
        return;
    }
    for window in Window::ALL {
        let arrived = report.sum(|_, _, found| found == window).requests;
        assert!(arrived >= ARRIVALS_MIN, "{arrived} requests arrived {}: too few to prove anything", window.name());
    }
}

/// Nothing fails, and no more ends with its pod than without Elasti. Where slices alone bring connections, kube-proxy goes on
/// sending some to a pod for a moment: then a target that ends at once loses no more than without Elasti.
fn compare(program: Program, report: &Report, control: &Report, redirects: bool) {
    let of = |report: &Report, prefix: &str| {
        let is = |service: &str| service.starts_with(&format!("{prefix}{}-", program.name()));
        (report.sum(|service, _, _| is(service)), report.cycles(is))
    };
    let ((count, cycles), (control_count, control_cycles)) = (of(report, ""), of(control, "control-"));
    println!(
        "{}: {} failed and {} ended with their pod in {} cycles; without Elasti {} and {} in {}",
        program.name(),
        count.failed,
        count.apart,
        cycles.len(),
        control_count.failed,
        control_count.apart,
        control_cycles.len()
    );
    let spared = !redirects && program != Program::Drains;
    assert!(spared || count.failed == 0, "requests without their right answer");
    let lost = |count: &Count| if spared { count.failed + count.apart } else { count.apart };
    let losses = |cycles: &[Count]| cycles.iter().map(lost).collect::<Vec<_>>();
    assert!(not_more(&losses(&cycles), &losses(&control_cycles)), "more is lost than without Elasti");
}
