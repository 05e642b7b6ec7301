//! `cargo xtask test`: all tests, from those that need a compiler only to those that need a whole cluster.
//!
//! Each level sets up what it needs and fails, rather than skips, where that cannot be had.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cluster::{Cluster, Options, ProxyMode, images};
use crate::{image, install, process, promtool};

mod cycles;
mod integrations;

/// What must be seen working on the whole cluster, by its number: a test that is missing or ignored fails the run.
const REQUIRED: &[&str] = &[
    "test_1_http_wakes_from_pods_hosts_and_node_ports",
    "test_1_tls_wakes_from_pods_hosts_and_node_ports",
    "test_1_redis_wakes_from_pods_hosts_and_node_ports",
    "test_1_a_server_that_speaks_first_wakes",
    "test_2_both_ports_of_a_service_wake_it",
    "test_3_ebpf_alone_wakes_and_the_client_sees_the_address_it_dialled",
    "test_3_the_slices_alone_wake",
    "test_4_namesakes_in_two_namespaces_wake_at_the_same_instant",
    "test_5_two_hundred_connections_at_once_are_answered_by_the_first_ready_pod",
    "test_6_a_target_that_is_deleted_holds_its_clients_until_the_hold_time_ends",
    "test_6_a_target_that_never_becomes_ready_holds_its_clients_until_the_hold_time_ends",
    "test_6_a_target_whose_image_cannot_be_pulled_holds_its_clients_until_the_hold_time_ends",
    "test_7_a_warm_service_passes_no_resolver",
    "a_busy_kept_connection_leaves_the_resolver_within_five_seconds_and_loses_nothing",
    "more_requests_than_the_target_takes_at_once_are_all_answered",
    "held_clients_are_refused_in_http",
    "e2e_01_proxy_by_hand",
    "e2e_02_serve_by_traffic_with_answers_of_each_kind",
    "e2e_03_serve_by_hand",
    "e2e_04_the_private_service_follows_the_public_one_at_zero",
    "e2e_05_the_private_service_goes_with_the_elasti_service",
    "e2e_06_the_slice_names_exactly_the_resolvers_that_there_are",
    "e2e_07_scaled_down_by_prometheus_with_a_filter",
    "e2e_08_proxy_until_a_pod_is_ready",
    "e2e_09_a_stateful_set_serves_by_traffic",
    "e2e_10_headers_reach_the_target_that_they_wake",
    "e2e_11_probes_are_answered_at_zero_and_wake_nothing",
    "e2e_12_a_second_request_of_the_same_connection_is_answered",
    "e2e_13_grpc_calls_and_streams_wake_beside_http",
    "clients_that_dial_endpoints_or_the_proxy_port_wake",
    "e2e_14_an_operator_of_one_namespace_leaves_others_alone",
    "kubeelasti_is_replaced_under_load_and_no_request_fails",
    "a_target_that_was_at_zero_before_its_elasti_service_is_intercepted",
    "services_with_local_traffic_policies_and_load_balancers_wake_on_every_node",
    "a_dual_stack_service_wakes_by_either_address_family",
    "clients_with_session_affinity_stay_with_one_pod_after_the_wake",
    "what_is_changed_in_a_service_while_its_target_sleeps_is_followed",
    "a_client_that_dials_the_address_of_an_ending_pod_is_held_and_answered_by_the_next_one",
    "kubelets_probes_of_an_ending_pod_wake_nothing",
    "a_target_sleeps_when_only_kubelet_and_an_ignored_scraper_talk_to_it",
    "a_target_stays_awake_while_anybody_talks_to_it_and_sleeps_when_nobody_does",
    "a_load_balancers_bare_connections_wake_nothing_and_data_or_silence_does",
    "fault_1_a_rollout_of_the_resolvers_loses_no_request",
    "fault_1_a_resolver_that_is_deleted_loses_no_request",
    "fault_2_a_killed_resolver_is_replaced_by_another_within_a_second",
    "fault_3_a_killed_leader_delays_no_wake_and_puts_nothing_to_sleep",
    "fault_4_without_operators_connections_are_held_and_answered_when_they_are_back",
    "fault_4_without_the_api_server_connections_are_held_and_answered_when_it_is_back",
    "fault_5_programs_that_are_detached_are_attached_again_and_nothing_is_lost",
    "fault_6_the_resolver_of_a_node_that_vanishes_leaves_the_slices_and_the_other_node_wakes",
    "fault_6_the_resolver_of_a_node_that_vanishes_with_the_leader_leaves_the_slices_too",
    "operators_are_on_different_nodes_even_if_one_has_more_room",
    "fault_7_ten_thousand_connections_of_one_client_disturb_nobody_else",
    "a_target_that_is_up_between_two_probes_of_kubelet_answers_long_before_kubelet_calls_it_ready",
    "a_target_that_is_up_after_300_ms_answers_then_and_not_at_kubelets_first_turn_after_10_s",
    "a_target_whose_probe_runs_in_the_container_is_waited_for_until_kubelet_calls_it_ready",
    "a_frontend_wakes_with_its_database",
    "a_client_is_held_through_the_crashes_of_its_target",
    "a_target_that_is_scaled_to_zero_in_the_middle_of_a_wake_is_woken_again",
    "a_target_that_flaps_is_intercepted_while_it_is_not_ready_and_served_while_it_is",
    "a_rolling_update_at_one_replica_fails_no_request",
    "an_update_that_recreates_the_only_pod_fails_no_request",
    "scaling_by_hand_to_zero_fails_no_request_of_a_target_that_drains",
];

/// Tests of the cluster that run side by side: they mostly wait, but pods start on the same few cores.
const CLUSTER_THREADS: &str = "3";

/// Options of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run one level only
    #[arg(long, value_enum)]
    only: Option<Level>,
    /// Leave the clusters up for a look; `cargo xtask cluster --name NAME down` removes them
    #[arg(long)]
    keep: bool,
    /// Name of the cluster, so that two checkouts can be tested side by side
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    cycles: cycles::CyclesArgs,
    /// Run only tests whose name contains this
    filter: Option<String>,
}

impl Args {
    fn cluster(&self, usual: &str) -> String {
        self.name.clone().unwrap_or_else(|| usual.to_owned())
    }
}

/// What tests need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// A compiler
    Unit,
    /// Network namespaces, cgroups and the real eBPF object
    Netns,
    /// A real API server
    Api,
    /// A whole cluster
    Cluster,
    /// Whole clusters on which Services go to zero and come again under load
    Cycles,
    /// A whole cluster with a real KEDA and a real Argo Rollouts; only when it is asked for
    Integrations,
}

/// Runs the tests: every level, also after one that failed, and says at the end what failed in which.
pub(crate) fn run(args: &Args) -> Result<()> {
    let all = [Level::Unit, Level::Netns, Level::Api, Level::Cluster, Level::Cycles];
    let mut failed = Vec::new();
    for level in args.only.map_or(all.to_vec(), |only| vec![only]) {
        let name = format!("{level:?}").to_lowercase();
        eprintln!("== tests: {name}");
        let result = match level {
            Level::Unit => unit(args),
            Level::Netns => netns(args),
            Level::Api => api(args),
            Level::Cluster => cluster(args),
            Level::Cycles => cycles::run(args),
            Level::Integrations => integrations::run(args),
        };
        if let Err(error) = result {
            eprintln!("== tests: {name} failed");
            failed.push(format!("{name}: {error:#}"));
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}

fn unit(args: &Args) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--locked"]);
    process::run(command.args(&args.filter))?;
    if args.filter.is_none() {
        let mut interleavings = cargo();
        interleavings.args(["run", "--package", "elasti-resolver", "--locked", "--example", "interleavings"]);
        process::run(&mut interleavings)?;
    }
    Ok(())
}

fn netns(args: &Args) -> Result<()> {
    for test in build("netns")? {
        process::run(Command::new(test).args(&args.filter))?;
    }
    Ok(())
}

fn api(args: &Args) -> Result<()> {
    let tests = build("api")?;
    let promtool = promtool::path()?;
    let options = Options { name: args.cluster("elasti-api"), kube_proxy: ProxyMode::default(), api_server_only: true };
    with_cluster(args, &options, |cluster| {
        let mut outcome = Outcome::default();
        for test in tests {
            let mut command = cluster.command_in_node(1, test)?;
            command.env("KUBECONFIG", cluster.kubeconfig()).env("PROMTOOL", &promtool);
            outcome.run(command.args(&args.filter))?;
        }
        outcome.passed().map(drop)
    })
}

fn cluster(args: &Args) -> Result<()> {
    let tests = build("cluster")?;
    let options =
        Options { name: args.cluster("elasti-test"), kube_proxy: ProxyMode::default(), api_server_only: false };
    with_cluster(args, &options, |cluster| {
        let passed = run_on(cluster, args, &tests)?;
        let missing: Vec<_> = REQUIRED.iter().filter(|name| !passed.iter().any(|passed| passed == *name)).collect();
        if args.filter.is_none() && !missing.is_empty() {
            bail!("these tests must run and pass, and did not: {missing:?}");
        }
        Ok(())
    })
}

/// Installs the product on a whole cluster and runs these tests on it; returns the names of those that passed, if all did.
fn run_on(cluster: &Cluster, args: &Args, tests: &[PathBuf]) -> Result<Vec<String>> {
    // Debian's package has both; the tests' pods get it from here.
    let prometheus = promtool::path()?.with_file_name("prometheus");
    let traffic = image::compile(&[cycles::TRAFFIC], &[])?.join(cycles::TRAFFIC);
    install::install(cluster)?;
    cluster.load_image(&images::traffic(&traffic)?)?;
    let mut outcome = Outcome::default();
    for test in tests {
        let mut command = cluster.command_in_node(1, test)?;
        command.args(&args.filter).args(["--test-threads", CLUSTER_THREADS]);
        command.env("KUBECONFIG", cluster.kubeconfig()).env("ELASTI_KUBECTL", Cluster::kubectl_path());
        command.env("ELASTI_PROMETHEUS", &prometheus);
        command.env("ELASTI_NODES", format!("{},{}", cluster.netns(1)?, cluster.netns(2)?));
        outcome.run(&mut command)?;
    }
    outcome.passed()
}

/// Starts a cluster, uses it, and takes it down unless it is to be kept. Afresh, whatever an earlier run has left.
fn with_cluster(args: &Args, options: &Options, body: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    if !args.keep {
        Cluster::open(&options.name)?.down()?;
    }
    let cluster = Cluster::up(options)?;
    let result = body(&cluster);
    if !args.keep {
        cluster.down()?;
    }
    result
}

/// Builds the tests of a level and the programs that they use; returns the tests.
fn build(level: &str) -> Result<Vec<PathBuf>> {
    build_some(level, level)
}

/// As [`build`], for those tests of a level whose name begins so.
fn build_some(level: &str, begin: &str) -> Result<Vec<PathBuf>> {
    let mut command = cargo();
    // The whole workspace is named so that dependencies are those of the unit level, built already.
    command.args(["test", "--workspace", "--locked", "--no-run"]);
    command.args(["--features", &format!("elasti-tests/{level}"), "--test", &format!("{begin}*")]);
    command.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut tests: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| {
            let name = message["target"]["name"].as_str().unwrap_or_default();
            message["target"]["kind"][0] == "test" && name.starts_with(begin)
        })
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    tests.sort();
    if tests.is_empty() {
        bail!("there are no tests {begin} of the level {level}");
    }
    Ok(tests)
}

/// What came of test programs.
#[derive(Default)]
struct Outcome {
    /// Names of the tests that passed.
    passed: Vec<String>,
    /// Names of those that failed, or the program that ended otherwise.
    failed: Vec<String>,
    /// Where and why they panicked.
    said: Vec<String>,
}

impl Outcome {
    /// Runs one more program and shows what it prints.
    fn run(&mut self, command: &mut Command) -> Result<()> {
        command.env("RUST_BACKTRACE", "0").stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let stdout = child.stdout.take().context("the output is piped")?;
        let (failed, mut of_panic) = (self.failed.len(), false);
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            print(&line);
            let named = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
            match named {
                Some((name, "ok")) => self.passed.push(name.to_owned()),
                Some((name, "FAILED")) => self.failed.push(name.to_owned()),
                _ => {}
            }
            of_panic = (of_panic && !line.starts_with("note: ") && !line.is_empty())
                || (line.starts_with("thread '") && line.contains(" panicked at "));
            if of_panic {
                self.said.push(line);
            }
        }
        let status = child.wait()?;
        if !status.success() && self.failed.len() == failed {
            bail!("{command:?} failed: {status}");
        }
        Ok(())
    }

    /// The names of the tests, all of which passed; else says once more, at the end where a long output is read first, which
    /// failed and why.
    fn passed(self) -> Result<Vec<String>> {
        let Self { passed, failed, said } = self;
        if !failed.is_empty() {
            bail!("{} failed, {} passed\n{}", failed.join(", "), passed.len(), said.join("\n"));
        }
        Ok(passed)
    }
}

#[expect(clippy::print_stdout, reason = "the tests' own output")]
fn print(line: &str) {
    println!("{line}");
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(process::root());
    command
}
