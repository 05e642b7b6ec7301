//! The real eBPF object follows connections to servers in cgroups and a network namespace of their own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elasti_resolver::redirect::Redirector;
use elasti_resolver::redirect::sockets::Sockets;
use elasti_resolver::tracking::{Seen, Track, Wanted};
use elasti_tests::bpf::detach_programs;
use elasti_tests::netns::{Host, RESOLVER};
use resolver_ebpf::OWN_MARK;

const POD: &str = "01234567-89ab-cdef-0123-456789abcdef";
const POD_CGROUP: &str = "kubepods/burstable/pod01234567-89ab-cdef-0123-456789abcdef";

/// A host with a pod whose server never says a word, and what follows its connections.
struct Followed {
    host: Host,
    addresses: Vec<SocketAddr>,
    wanted: BTreeMap<SocketAddr, Wanted>,
    sockets: Sockets,
    _redirector: Redirector,
}

impl Followed {
    fn new(test: &str) -> Self {
        let (host, port) = host(test);
        Self::of(host, port, None)
    }

    fn of(host: Host, port: u16, adopt: Option<&str>) -> Self {
        let addresses: Vec<SocketAddr> =
            RESOLVER.iter().map(|address| SocketAddr::new(address.parse().unwrap(), port)).collect();
        let (redirector, sockets) = Redirector::load_following(host.cgroup(), false, &["kubelet".to_owned()]).unwrap();
        let wanted = Wanted { adopt: adopt.map(str::to_owned), ..Wanted::default() };
        let wanted = addresses.iter().map(|address| (*address, wanted.clone())).collect();
        let mut it = Self { host, addresses, wanted, sockets: sockets.unwrap(), _redirector: redirector };
        it.sockets.sync(&it.wanted);
        it
    }

    /// What was seen of connections to the IPv4 address.
    fn seen(&mut self) -> Seen {
        let mut seen = self.sockets.look().unwrap();
        let seen = seen.remove(&self.addresses[0]).unwrap();
        assert_eq!(seen.fault, None);
        seen
    }

    /// Looks until it is as wished.
    fn until(&mut self, what: &str, wish: impl Fn(&Seen) -> bool) -> Seen {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let seen = self.seen();
            if wish(&seen) {
                return seen;
            }
            assert!(Instant::now() < deadline, "{what}: {seen:?}");
        }
    }

    fn connect_as(&self, name: &str, cgroup: &str) {
        drop(self.host.talk_as(name, cgroup, self.addresses[0]));
    }
}

fn host(test: &str) -> (Host, u16) {
    let mut host = Host::new(test);
    for cgroup in ["kubelet", "kubepods/podother", POD_CGROUP] {
        host.make_cgroup(cgroup);
    }
    let port = host.keep(POD_CGROUP);
    (host, port)
}

#[tokio::test]
async fn connections_are_counted_while_they_are_open_whatever_socket_dials() {
    let mut it = Followed::new("count");
    let before = it.seen();
    assert_eq!(before, Seen { idle: before.idle, ..Seen::default() });
    let [four, six] = [it.addresses[0], it.addresses[1]];
    let (first, second, third) = (it.host.talk(four), it.host.talk(four), it.host.talk(six));
    let seen = it.until("open", |seen| seen.open == 2);
    assert_eq!((seen.opened, seen.visible), (2, true));
    assert_eq!(it.sockets.look().unwrap()[&six].open, 1);
    drop((first, third));
    it.until("one is left", |seen| seen.open == 1);
    drop(second);
    assert_eq!(it.until("closed", |seen| seen.open == 0).opened, 2);
    let mapped = SocketAddr::new(format!("::ffff:{}", four.ip()).parse().unwrap(), four.port());
    let _mapped = it.host.talk(mapped);
    assert_eq!(it.until("mapped", |seen| seen.open == 1).opened, 3);
    assert!(it.host.connect(&["--udp", &four.to_string()]).contains(&four.to_string()));
    assert_eq!(it.seen().opened, 3);
}

#[tokio::test]
async fn data_of_the_client_alone_is_seen_and_silence_is_too() {
    let mut it = Followed::new("data");
    let mut talk = it.host.talk(it.addresses[0]);
    let pause = Duration::from_millis(300);
    it.until("silence", |seen| seen.idle > pause);
    assert_eq!(it.seen().open, 1, "a silent connection is one");
    talk.say();
    it.until("one byte", |seen| seen.idle < pause);
    it.until("silence again", |seen| seen.idle > pause);
    assert_eq!(it.seen().opened, 1);
    drop(it.host.talk(it.addresses[0]));
    it.until("a connection that may have ended since", |seen| seen.idle < pause && seen.opened == 2);
}

#[tokio::test]
async fn kubelet_resolvers_and_ignored_sources_do_not_count_and_a_pod_that_calls_itself_kubelet_does() {
    let mut it = Followed::new("ignored");
    it.connect_as("kubelet", "kubelet");
    assert!(it.seen().visible, "it was seen");
    let address = it.addresses[0].to_string();
    assert!(it.host.connect(&["--mark", &OWN_MARK.to_string(), &address]).contains("error"));
    assert_eq!(it.seen().opened, 0);
    it.connect_as("kubelet", "kubepods/podother");
    assert_eq!(it.seen().opened, 1);
    it.connect_as("kubectl", "kubelet");
    assert_eq!(it.seen().opened, 2);
    let ignore = |it: &mut Followed, ranges: &[&str]| {
        let ignored = Arc::new(ranges.iter().map(|range| range.parse().unwrap()).collect());
        it.wanted.values_mut().for_each(|wanted| wanted.ignored = Arc::clone(&ignored));
        it.sockets.sync(&it.wanted);
    };
    ignore(&mut it, &["10.200.0.0/24", "fd00::/8"]);
    for address in it.addresses.clone() {
        drop(it.host.talk(address));
    }
    assert_eq!(it.sockets.look().unwrap().values().map(|seen| seen.opened).sum::<u64>(), 2);
    ignore(&mut it, &["10.201.0.0/24"]);
    drop(it.host.talk(it.addresses[0]));
    assert_eq!(it.seen().opened, 3);
}

/// A client outside of pods shares its address with kubelet, and may get the port of a probe that nobody answered.
#[tokio::test]
async fn a_client_with_the_port_of_a_dial_that_was_refused_counts() {
    const PORT: u16 = 8080;
    const FROM: &str = "40000";
    let mut it = Followed::of(Host::new("refused"), PORT, None);
    let address = it.addresses[0].to_string();
    let refused = it.host.connect(&["--from", FROM, "--mark", &OWN_MARK.to_string(), &address]);
    assert!(refused.contains("refused"), "{refused}");
    it.host.serve_at("pod", PORT);
    assert_eq!(it.host.connect(&["--from", FROM, &address]), format!("{address} pod"));
    assert_eq!(it.seen().opened, 1);
}

#[tokio::test]
async fn other_addresses_are_left_alone_and_one_that_is_followed_no_more_too() {
    let mut it = Followed::new("others");
    let other = it.host.keep("");
    drop(it.host.talk(SocketAddr::new(it.addresses[0].ip(), other)));
    assert_eq!(it.seen().opened, 0);
    let _open = it.host.talk(it.addresses[0]);
    assert_eq!(it.seen().opened, 1);
    it.sockets.sync(&BTreeMap::new());
    assert!(it.sockets.look().unwrap().is_empty());
    it.sockets.sync(&it.wanted.clone());
    let seen = it.seen();
    assert_eq!((seen.opened, seen.open), (0, 0), "it begins anew, and the older connection is not its own");
}

#[tokio::test]
async fn a_connection_that_is_older_than_the_resolver_is_followed_from_its_next_packet_on() {
    let (host, port) = host("older");
    let mut older = host.talk(SocketAddr::new(RESOLVER[0].parse().unwrap(), port));
    older.say();
    let mut it = Followed::of(host, port, Some(POD));
    let pause = Duration::from_millis(300);
    let seen = it.until("silence", |seen| seen.idle > pause);
    assert_eq!((seen.opened, seen.open), (0, 0), "nobody can know of it yet");
    older.say();
    it.until("one byte", |seen| seen.idle < pause && seen.open == 1);
    it.wanted.values_mut().for_each(|wanted| wanted.adopt = None);
    it.sockets.sync(&it.wanted);
    it.until("silence again", |seen| seen.idle > pause);
    older.say();
    it.until("it stays followed", |seen| seen.idle < pause);
    drop(older);
    it.until("closed", |seen| seen.open == 0);
}

#[tokio::test]
async fn a_pod_whose_cgroup_is_not_found_is_no_pod_without_connections() {
    let (host, port) = host("nocgroup");
    let mut it = Followed::of(host, port, Some("89abcdef-0123-0123-0123-0123456789ab"));
    let seen = it.sockets.look().unwrap();
    assert!(seen.values().all(|seen| seen.fault.as_ref().is_some_and(|fault| fault.contains("cgroup"))), "{seen:?}");
}

#[tokio::test]
async fn what_was_detached_is_attached_again() {
    let mut it = Followed::new("lapse");
    assert_eq!(it.sockets.reattach(), Ok(false));
    assert_eq!(detach_programs(it.host.cgroup()), 5);
    assert_eq!(it.sockets.reattach(), Ok(true));
    let _open = it.host.talk(it.addresses[0]);
    assert_eq!(it.seen().opened, 1);
}
