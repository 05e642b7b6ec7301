//! The real eBPF object in a cgroup and a network namespace of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use elasti_resolver::draining::Draining;
use elasti_resolver::interception::{Changes, Entries, Redirect};
use elasti_resolver::redirect::{Redirector, entries};
use elasti_tests::bpf::detach_programs;
use elasti_tests::netns::{Host, RESOLVER};
use resolver_ebpf::{Counter, HEARTBEAT_TTL_NS, OWN_MARK};

const SERVICE4: &str = "10.96.0.10:80";
const SERVICE6: &str = "[fd00:96::a]:80";

/// A host whose connections to a Service are redirected to a server named `resolver`.
struct Redirected {
    host: Host,
    redirector: Redirector,
    wanted: Entries,
}

impl Redirected {
    fn new(test: &str) -> Self {
        let mut host = Host::new(test);
        let port = host.serve("resolver");
        let wanted = to(port);
        let mut redirector = Redirector::load(host.cgroup(), false).unwrap();
        redirector.sync(&wanted).unwrap();
        Self { host, redirector, wanted }
    }
}

fn to(port: u16) -> Entries {
    let target = |ip: &str| SocketAddr::new(ip.parse().unwrap(), port);
    [(SERVICE4.parse().unwrap(), target(RESOLVER[0])), (SERVICE6.parse().unwrap(), target(RESOLVER[1]))].into()
}

fn passes(seen: &str) -> bool {
    seen.starts_with("error") && seen.contains("unreachable")
}

#[tokio::test]
async fn connections_are_redirected_and_see_the_address_that_they_dialled() {
    let it = Redirected::new("connect");
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} resolver"));
    assert_eq!(it.host.connect(&[SERVICE6]), format!("{SERVICE6} resolver"));
    assert_eq!(it.redirector.counter(Counter::Redirected), 2);
}

#[tokio::test]
async fn an_ipv6_socket_that_dials_ipv4_is_redirected_too() {
    let it = Redirected::new("mapped");
    assert_eq!(it.host.connect(&["--mapped", SERVICE4]), format!("[::ffff:10.96.0.10]:80 resolver"));
}

#[tokio::test]
async fn whatever_is_not_in_the_map_passes_untouched() {
    let mut it = Redirected::new("miss");
    let other = it.host.serve("other");
    let other = format!("{}:{other}", RESOLVER[0]);
    assert_eq!(it.host.connect(&[&other]), format!("{other} other"));
    assert!(passes(&it.host.connect(&["10.96.0.10:81"])), "another port");
    assert!(passes(&it.host.connect(&["10.96.0.11:80"])), "another address");
    it.redirector.sync(&Entries::new()).unwrap();
    assert!(passes(&it.host.connect(&[SERVICE4])), "an entry that was removed");
}

#[tokio::test]
async fn a_change_concerns_the_addresses_that_it_names_and_no_other() {
    let mut it = Redirected::new("change");
    let [four, six]: [SocketAddr; 2] = [SERVICE4, SERVICE6].map(|service| service.parse().unwrap());
    let change = |redirector: &mut Redirector, from, to| redirector.change(&Changes::from([(from, to)])).unwrap();
    change(&mut it.redirector, four, None);
    change(&mut it.redirector, four, None);
    assert!(passes(&it.host.connect(&[SERVICE4])), "an entry that was removed");
    assert_eq!(it.host.connect(&[SERVICE6]), format!("{SERVICE6} resolver"));
    let other = SocketAddr::new(RESOLVER[0].parse().unwrap(), it.host.serve("other"));
    change(&mut it.redirector, four, Some(other));
    // What else is looked up is written anew meanwhile.
    it.redirector.sync_draining(&Draining::default()).unwrap();
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} other"));
    change(&mut it.redirector, four, Some(it.wanted[&four]));
    change(&mut it.redirector, six, None);
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} resolver"));
    assert!(passes(&it.host.connect(&[SERVICE6])));
    it.wanted.remove(&six);
    assert_eq!(it.redirector.sync(&it.wanted), Ok(false), "nothing was left to do");
}

#[tokio::test]
async fn udp_is_not_touched() {
    let it = Redirected::new("udp");
    assert!(passes(&it.host.connect(&["--udp", SERVICE4])));
    assert_eq!(it.redirector.counter(Counter::Redirected), 0);
}

#[tokio::test]
async fn the_resolvers_own_connections_are_not_redirected() {
    let it = Redirected::new("mark");
    assert!(passes(&it.host.connect(&["--mark", &OWN_MARK.to_string(), SERVICE4])));
    assert!(passes(&it.host.connect(&["--mark", &OWN_MARK.to_string(), SERVICE6])));
}

#[tokio::test]
async fn connections_pass_when_the_heartbeat_stops() {
    let it = Redirected::new("heartbeat");
    assert!(!passes(&it.host.connect(&[SERVICE4])));
    it.redirector.stop_heartbeat();
    let deadline = Instant::now() + 5 * Duration::from_nanos(HEARTBEAT_TTL_NS);
    while !passes(&it.host.connect(&[SERVICE4])) {
        assert!(Instant::now() < deadline, "still redirected");
    }
    assert!(it.redirector.counter(Counter::Stale) > 0);
}

/// Keeps out B12: one resolver, and nothing without it.
#[tokio::test]
async fn connections_pass_when_the_resolver_is_gone() {
    let it = Redirected::new("gone");
    assert!(!passes(&it.host.connect(&[SERVICE4])));
    drop(it.redirector);
    assert!(passes(&it.host.connect(&[SERVICE4])));
}

#[tokio::test]
async fn a_socket_that_is_connected_anew_does_not_lie_about_its_peer() {
    let mut it = Redirected::new("anew");
    let other = it.host.serve("other");
    let other = format!("{}:{other}", RESOLVER[0]);
    assert_eq!(it.host.connect(&[SERVICE4, &other]), format!("{other} other"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_note_that_another_connection_has_displaced_is_answered_to_nobody_else() {
    let mut it = Redirected::new("displaced");
    let other = "10.96.0.11:81";
    it.wanted.insert(other.parse().unwrap(), it.wanted[&SERVICE4.parse().unwrap()]);
    it.redirector.sync(&it.wanted).unwrap();
    let resolver = it.wanted[&SERVICE4.parse().unwrap()];
    assert_eq!(it.host.displace(SERVICE4, other), format!("{resolver} {other}"));
}

#[tokio::test]
async fn two_resolvers_share_a_node_during_a_rollout() {
    let mut it = Redirected::new("rollout");
    let port = it.host.serve("newer");
    let mut newer = Redirector::load(it.host.cgroup(), false).unwrap();
    newer.sync(&to(port)).unwrap();
    // Programs of one cgroup run in the order of their attachment; the address that the older one has put in is not in
    // the map of the newer one.
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} resolver"));
    it.redirector.sync(&Entries::new()).unwrap();
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} newer"), "the older one leaves");
    drop(it.redirector);
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} newer"));
}

#[tokio::test]
async fn a_map_that_was_changed_behind_our_back_is_repaired() {
    let mut it = Redirected::new("repair");
    let mut foreign = it.wanted.clone();
    foreign.remove(&SERVICE4.parse().unwrap());
    foreign.insert("10.96.0.99:1".parse().unwrap(), "10.200.0.1:1".parse().unwrap());
    it.redirector.sync(&foreign).unwrap();
    assert_eq!(it.redirector.sync(&it.wanted), Ok(true), "it says so");
    assert_eq!(it.redirector.sync(&it.wanted), Ok(false), "and has nothing more to do");
    assert_eq!(entries(&it.redirector), it.wanted);
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} resolver"));
}

const ENDING_POD: &str = "10.244.1.9:8080";
const ENDING_UID: &str = "01234567-89ab-cdef-0123-456789abcdef";

/// A host with a place for pods, where the address of an ending pod leads to a server named `resolver`.
fn ending_pod(test: &str) -> (Host, Redirector) {
    let mut host = Host::new(test);
    let port = host.serve("resolver");
    for cgroup in ["kubelet", "kubepods/podother", &format!("kubepods/burstable/pod{ENDING_UID}/container")] {
        host.make_cgroup(cgroup);
    }
    let mut redirector = Redirector::load(host.cgroup(), false).unwrap();
    let to = SocketAddr::new(RESOLVER[0].parse().unwrap(), port);
    let entries = [(ENDING_POD.parse().unwrap(), to)].into();
    redirector.sync_draining(&Draining { entries, pods: [ENDING_UID.to_owned()].into() }).unwrap();
    (host, redirector)
}

#[tokio::test]
async fn the_address_of_an_ending_pod_is_redirected_for_other_pods_and_neither_for_kubelet_nor_for_itself() {
    let (host, mut redirector) = ending_pod("ending");
    assert_eq!(host.connect_from("kubepods/podother", &[ENDING_POD]), format!("{ENDING_POD} resolver"));
    assert_eq!(redirector.counter(Counter::Redirected), 1);
    assert!(passes(&host.connect_from("kubelet", &[ENDING_POD])), "kubelet probes it until it has ended");
    assert!(passes(&host.connect_from("", &[ENDING_POD])), "no pod");
    let own = format!("kubepods/burstable/pod{ENDING_UID}/container");
    assert!(passes(&host.connect_from(&own, &[ENDING_POD])), "the pod itself");
    let mark = ["--mark", &OWN_MARK.to_string(), ENDING_POD];
    assert!(passes(&host.connect_from("kubepods/podother", &mark)), "the resolver");
    assert!(passes(&host.connect_from("kubepods/podother", &["10.244.1.9:81"])), "another port");
    redirector.sync_draining(&Draining::default()).unwrap();
    assert!(passes(&host.connect_from("kubepods/podother", &[ENDING_POD])), "an entry that was removed");
    assert_eq!(redirector.counter(Counter::Redirected), 1);
}

#[tokio::test]
async fn services_are_redirected_for_kubelet_and_ending_pods_too() {
    let mut it = Redirected::new("everybody");
    for cgroup in ["kubelet", &format!("kubepods/pod{ENDING_UID}")] {
        it.host.make_cgroup(cgroup);
        assert_eq!(it.host.connect_from(cgroup, &[SERVICE4]), format!("{SERVICE4} resolver"), "{cgroup}");
    }
    // Where no cgroup of pods was found, addresses of pods are left alone and nothing else suffers.
    it.redirector.sync_draining(&Draining { entries: it.wanted.clone(), ..Draining::default() }).unwrap();
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} resolver"));
}

#[tokio::test]
async fn programs_that_were_detached_behind_our_back_are_attached_again() {
    let mut it = Redirected::new("reattach");
    assert_eq!(it.redirector.reattach(), Ok(false), "nothing to repair");
    assert_eq!(detach_programs(it.host.cgroup()), 4);
    assert!(passes(&it.host.connect(&[SERVICE4])), "the slices bring it");
    assert_eq!(it.redirector.reattach(), Ok(true));
    assert_eq!(it.redirector.reattach(), Ok(false), "repaired once");
    assert_eq!(it.host.connect(&[SERVICE4]), format!("{SERVICE4} resolver"));
    assert_eq!(it.host.connect(&[SERVICE6]), format!("{SERVICE6} resolver"));
}

/// What the programs log; no other test here has them log.
static LINES: Lines = Lines(Mutex::new(vec![]));

struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[tokio::test]
async fn redirected_connections_are_logged_when_that_is_wanted() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let mut host = Host::new("log");
    let port = host.serve("resolver");
    let mut redirector = Redirector::load(host.cgroup(), true).unwrap();
    redirector.sync(&to(port)).unwrap();
    assert_eq!(host.connect(&[SERVICE4]), format!("{SERVICE4} resolver"));
    assert_eq!(host.connect(&[SERVICE6]), format!("{SERVICE6} resolver"));
    let logged = || LINES.0.lock().unwrap().iter().filter(|line| line.contains("redirected port 80")).count();
    let deadline = Instant::now() + Duration::from_secs(5);
    while logged() < 2 {
        assert!(Instant::now() < deadline, "{:?}", LINES.0.lock().unwrap());
        tokio::task::yield_now().await;
    }
}
