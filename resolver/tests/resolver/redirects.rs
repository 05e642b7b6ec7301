//! Redirects: what is written into the map, in which order, and when it is withdrawn.

use std::net::SocketAddr;
use std::time::Duration;

use elasti_api::message::{Mode, OperatorMessage, ResolverMessage, ServiceState};
use elasti_resolver::app::Redirection;
use elasti_resolver::draining::Draining;
use elasti_resolver::fallback::Patience;
use elasti_resolver::interception::{Changes, Entries, Redirect};
use tokio::sync::watch;

use crate::operator::Operator;
use crate::world::{DEADLINE, World, free_port, state};

/// Remembers the map, and whether its targets were listening when it was written.
struct Fake(watch::Sender<(Entries, bool)>, watch::Sender<Draining>);

impl Redirect for Fake {
    fn change(&mut self, changes: &Changes) -> Result<(), String> {
        let mut entries = self.0.borrow().0.clone();
        for (from, to) in changes {
            match to {
                Some(to) => entries.insert(*from, *to),
                None => entries.remove(from),
            };
        }
        self.sync(&entries).map(drop)
    }

    fn sync(&mut self, entries: &Entries) -> Result<bool, String> {
        let listening = entries.values().all(|to| std::net::TcpStream::connect(to).is_ok());
        let changed = self.0.send_if_modified(|old| {
            let new = (entries.clone(), listening);
            let changed = *old != new;
            *old = new;
            changed
        });
        Ok(changed)
    }

    fn reattach(&mut self) -> Result<bool, String> {
        Ok(false)
    }

    fn passed(&self) -> u64 {
        0
    }

    fn sync_draining(&mut self, draining: &Draining) -> Result<(), String> {
        self.1.send_replace(draining.clone());
        Ok(())
    }
}

async fn redirecting(services: Vec<ServiceState>, patience: Patience) -> (World, watch::Receiver<(Entries, bool)>) {
    let (world, written, _) = draining(services, patience).await;
    (world, written)
}

async fn draining(
    services: Vec<ServiceState>,
    patience: Patience,
) -> (World, watch::Receiver<(Entries, bool)>, watch::Receiver<Draining>) {
    let ((map, written), (pods, draining)) =
        (watch::channel((Entries::new(), true)), watch::channel(Draining::default()));
    let redirection =
        Redirection::On { redirect: Box::new(Fake(map, pods)), mark: |_| Ok(()), track: Err("off".into()) };
    (World::with(services, redirection, patience).await, written, draining)
}

async fn holds(map: &mut watch::Receiver<(Entries, bool)>, wanted: &[(&str, u16)]) {
    let wanted: Entries =
        wanted.iter().map(|(from, port)| (from.parse().unwrap(), SocketAddr::from(([127, 0, 0, 1], *port)))).collect();
    let written = tokio::time::timeout(DEADLINE, map.wait_for(|(entries, _)| *entries == wanted)).await;
    assert!(written.expect("the map is another").unwrap().1, "redirected to a port that is not listening");
}

async fn hears_redirecting(operator: &Operator, wanted: bool) {
    let latest = |all: &[ResolverMessage]| {
        all.iter().rev().find_map(|message| match message {
            ResolverMessage::Ack { redirecting, .. } => Some(*redirecting),
            _ => None,
        })
    };
    operator.hears("the acknowledgement", |all| latest(all) == Some(wanted)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_ips_are_redirected_once_the_port_listens_and_no_longer_than_told() {
    let port = free_port();
    let (world, mut map) = redirecting(vec![state("a", 1, port, &[])], Patience::default()).await;
    holds(&mut map, &[("10.96.0.1:80", port)]).await;
    hears_redirecting(&world.operator, true).await;
    world.metric_is("elasti_resolver_redirect_enabled", "", 1.0).await;
    world.operator.set(&ServiceState { mode: Mode::Serve, redirect: false, ..state("a", 2, port, &[]) });
    holds(&mut map, &[]).await;
    hears_redirecting(&world.operator, false).await;
    world.operator.set(&state("a", 3, port, &[]));
    holds(&mut map, &[("10.96.0.1:80", port)]).await;
    world.operator.send(&OperatorMessage::Remove { uid: "a".into() });
    holds(&mut map, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_cannot_be_opened_is_not_redirected_to() {
    let (taken, free) = (free_port(), free_port());
    let occupier = std::net::TcpListener::bind(("0.0.0.0", taken)).unwrap();
    let other = ServiceState { cluster_ips: vec!["10.96.0.2".parse().unwrap()], ..state("b", 1, free, &[]) };
    let (world, mut map) = redirecting(vec![state("a", 1, taken, &[]), other], Patience::default()).await;
    world.operator.hears_listening("b", 1).await;
    holds(&mut map, &[("10.96.0.2:80", free)]).await;
    drop(occupier);
    holds(&mut map, &[("10.96.0.1:80", taken), ("10.96.0.2:80", free)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaving_resolver_redirects_nothing() {
    let port = free_port();
    let (world, mut map) = redirecting(vec![state("a", 1, port, &[])], Patience::default()).await;
    holds(&mut map, &[("10.96.0.1:80", port)]).await;
    world.shutdown.cancel();
    holds(&mut map, &[]).await;
    world.metric_is("elasti_resolver_redirect_enabled", "", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_silence_ends_redirection_and_a_word_brings_it_back() {
    let port = free_port();
    let patience = Patience { fallback: Duration::from_secs(1), redirect: Duration::from_secs(1) };
    let (mut world, mut map) = redirecting(vec![state("a", 1, port, &[])], patience).await;
    holds(&mut map, &[("10.96.0.1:80", port)]).await;
    let stream_port = world.operator.address.port();
    let spare = Operator::start(&world.identity, 0, vec![]).await;
    std::mem::replace(&mut world.operator, spare).kill().await;
    holds(&mut map, &[]).await;
    world.operator = Operator::start(&world.identity, stream_port, vec![state("a", 1, port, &[])]).await;
    holds(&mut map, &[("10.96.0.1:80", port)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_an_ending_pod_goes_by_itself_though_no_operator_takes_it_back() {
    let port = free_port();
    let mut ending = state("a", 1, port, &[]);
    ending.ports[0].draining = vec!["10.244.1.9:8080".parse().unwrap()];
    let begun = std::time::Instant::now();
    let (world, mut map, mut draining) = draining(vec![ending], Patience::default()).await;
    holds(&mut map, &[("10.96.0.1:80", port)]).await;
    let has = async |draining: &mut watch::Receiver<Draining>, count: usize| {
        let seen = tokio::time::timeout(DEADLINE, draining.wait_for(|now| now.entries.len() == count)).await;
        drop(seen.expect("other addresses of ending pods are redirected"));
    };
    has(&mut draining, 1).await;
    hears_redirecting(&world.operator, true).await;
    has(&mut draining, 0).await;
    assert!(begun.elapsed() >= elasti_api::message::DRAINING_LIFETIME);
    holds(&mut map, &[("10.96.0.1:80", port)]).await;
}
