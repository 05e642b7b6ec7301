//! No order of events loses a held connection, a place or a count. Time is virtual; backends are scripted.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use elasti_api::message::HoldPolicy;
use proptest::prelude::*;
use tokio::time::Instant as Moment;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::metrics::Metrics;
use crate::report::Board;

const PORT: u16 = 1;
const CLIENT: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
const BACKENDS: u16 = 3;
const MAX_HELD: u32 = 3;
const HOLD: Duration = Duration::from_secs(20);

/// Timers are rounded up to milliseconds.
const TICK: Duration = Duration::from_millis(5);

/// Real time that may pass between two lines of code on a busy machine.
const REAL: Duration = Duration::from_secs(1);

/// Whoever waits has reached a backend that has been there, up and not full for so long: two others that never answer
/// are tried first, after a pause.
const PATIENCE: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Up,
    Refuses,
    Silent,
    /// It is up, and the resolver has no port for it.
    NoPort,
}

#[derive(Clone, Debug)]
enum Event {
    Arrive,
    /// The client with this number, or the last one.
    Leave(usize),
    /// A forwarded connection ends.
    Finish(usize),
    View(Vec<u16>),
    PortRemoved,
    ServiceRemoved,
    Health(u16, Health),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let health = prop_oneof![Just(Health::Up), Just(Health::Refuses), Just(Health::Silent)];
    prop_oneof![
        6 => Just(Event::Arrive),
        2 => (0..12_usize).prop_map(Event::Leave),
        3 => (0..12_usize).prop_map(Event::Finish),
        4 => proptest::sample::subsequence((0..BACKENDS).collect::<Vec<_>>(), 0..=usize::from(BACKENDS))
            .prop_map(Event::View),
        1 => Just(Event::PortRemoved),
        1 => Just(Event::ServiceRemoved),
        5 => (0..BACKENDS, health).prop_map(|(backend, health)| Event::Health(backend, health)),
        4 => prop_oneof![0..300_u64, 0..8_000_u64].prop_map(Event::Pass),
    ]
}

fn address(backend: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 8000 + backend))
}

/// What the backends do.
#[derive(Clone, Debug)]
struct Backends(Arc<Mutex<[Health; BACKENDS as usize]>>);

impl Backends {
    fn health(&self, backend: u16) -> Health {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(backend)]
    }
}

impl Connect for Backends {
    type Connection = ();

    async fn connect(&self, address: SocketAddr, _: &[u8], within: Duration) -> io::Result<()> {
        match self.health(address.port() - 8000) {
            Health::Up => {
                sleep(Duration::from_millis(1)).await;
                Ok(())
            }
            Health::Refuses => Err(io::ErrorKind::ConnectionRefused.into()),
            Health::NoPort => Err(io::ErrorKind::AddrNotAvailable.into()),
            Health::Silent => Ok(timeout(within, std::future::pending()).await?),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waiting,
    Forwarded(SocketAddr),
    Finished,
    Closed(Closed),
}

#[derive(Debug)]
struct Connection {
    since: Moment,
    was_reachable: bool,
    left: CancellationToken,
    finish: CancellationToken,
    /// Its port has been away since it came.
    removed: bool,
    fate: Arc<Mutex<(Fate, Moment)>>,
}

impl Connection {
    fn fate(&self) -> (Fate, Moment) {
        *self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct World {
    service: Arc<Service>,
    backends: Backends,
    concurrency: Option<u32>,
    listed: Vec<u16>,
    connections: Vec<Connection>,
    ended: CancellationToken,
    /// Since when each backend could be reached by one more.
    available: BTreeMap<u16, Moment>,
    /// What a stream has last told the operators.
    told: Arc<AtomicUsize>,
}

impl World {
    fn new(concurrency: Option<u32>) -> Self {
        let board = Board::default();
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let service = Arc::new(Service::new("n", "s", metrics, board.news()));
        let told = Arc::new(AtomicUsize::new(0));
        let (mut news, stream, telling) = (board.follow(), Arc::clone(&service), Arc::clone(&told));
        tokio::spawn(async move {
            let _board = board;
            while news.changed().await.is_ok() {
                telling.store(stream.traffic().held as usize, Ordering::Relaxed);
            }
        });
        let mut world = Self {
            service,
            backends: Backends(Arc::new(Mutex::new([Health::Refuses; BACKENDS as usize]))),
            concurrency,
            listed: Vec::new(),
            connections: Vec::new(),
            ended: CancellationToken::new(),
            available: BTreeMap::new(),
            told,
        };
        world.view(Some(Vec::new()));
        world
    }

    fn view(&mut self, listed: Option<Vec<u16>>) {
        if listed.is_none() {
            for connection in &mut self.connections {
                connection.removed = true;
            }
        }
        let targets = listed.as_ref().map(|listed| listed.iter().map(|backend| address(*backend)).collect());
        let ports = targets.map(|targets| (PORT, PortView { targets, ..PortView::default() })).into_iter().collect();
        let hold = HoldPolicy {
            timeout: HOLD,
            max_connections: MAX_HELD,
            concurrency: self.concurrency,
            ..HoldPolicy::default()
        };
        self.service.set(View { hold, ports, ..View::default() });
        self.listed = listed.unwrap_or_default();
    }

    /// What [`crate::connection::serve`] does, without the bytes.
    fn arrive(&mut self) {
        let connection = Connection {
            since: Moment::now(),
            was_reachable: !self.listed.is_empty(),
            left: CancellationToken::new(),
            finish: CancellationToken::new(),
            removed: !self.service.view().ports.contains(PORT),
            fate: Arc::new(Mutex::new((Fate::Waiting, Moment::now()))),
        };
        let (service, dialer, concurrency) = (Arc::clone(&self.service), self.backends.clone(), self.concurrency);
        let (left, finish, ended) = (connection.left.clone(), connection.finish.clone(), self.ended.clone());
        let fate = Arc::clone(&connection.fate);
        let meets = move |new| *fate.lock().unwrap_or_else(PoisonError::into_inner) = (new, Moment::now());
        tokio::spawn(async move {
            service.accept(CLIENT);
            let client = Client { address: address(9), destination: address(9) };
            let concurrency = &Concurrency::of_connections(concurrency);
            let seeker = Seeker { service: &service, port: PORT, dialer, client, concurrency, since: Instant::now() };
            let reached = ended.run_until_cancelled(reach(&seeker, left.cancelled())).await;
            match reached.unwrap_or(Err(Closed::Shutdown)) {
                Ok(reached) => {
                    let forwarding = service.forward(CLIENT);
                    meets(Fate::Forwarded(reached.place.backend()));
                    ended.run_until_cancelled(finish.cancelled()).await;
                    drop((forwarding, reached.place));
                    meets(Fate::Finished);
                }
                Err(reason) => {
                    // One that fails here counts as held below, and is not.
                    assert!(reason != Closed::Limit || service.traffic().held == MAX_HELD, "{:?}", service.traffic());
                    service.close(reason);
                    meets(Fate::Closed(reason));
                }
            }
        });
        self.connections.push(connection);
    }

    fn connection(&self, at: usize, act: impl Fn(&Connection)) {
        self.connections.get(at).or(self.connections.last()).into_iter().for_each(act);
    }

    async fn happen(&mut self, event: &Event) {
        match event {
            Event::Arrive => self.arrive(),
            Event::Leave(at) => self.connection(*at, |connection| connection.left.cancel()),
            Event::Finish(at) => self.connection(*at, |connection| connection.finish.cancel()),
            Event::View(listed) => self.view(Some(listed.clone())),
            Event::PortRemoved => self.view(None),
            Event::ServiceRemoved => {
                self.view(None);
                self.service.remove();
            }
            Event::Health(backend, health) => {
                self.backends.0.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(*backend)] = *health;
            }
            Event::Pass(millis) => {
                let end = Moment::now() + Duration::from_millis(*millis);
                while Moment::now() < end {
                    // In steps, so that what becomes available in between is noticed.
                    tokio::time::sleep_until(end.min(Moment::now() + Duration::from_millis(50))).await;
                    self.note_available();
                }
            }
        }
        // Everything that can happen at this moment has happened then: no chain of wakes is longer.
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        self.note_available();
        self.check();
    }

    fn forwarded(&self, to: Option<SocketAddr>) -> u32 {
        let is = |connection: &&Connection| matches!(connection.fate().0, Fate::Forwarded(at) if to.is_none_or(|to| at == to));
        u32::try_from(self.connections.iter().filter(is).count()).unwrap()
    }

    fn note_available(&mut self) {
        for backend in 0..BACKENDS {
            let room = self.concurrency.is_none_or(|limit| self.forwarded(Some(address(backend))) < limit);
            if room && self.listed.contains(&backend) && self.backends.health(backend) == Health::Up {
                self.available.entry(backend).or_insert_with(Moment::now);
            } else {
                self.available.remove(&backend);
            }
        }
    }

    fn check(&self) {
        let now = Moment::now();
        let traffic = self.service.traffic();
        for connection in &self.connections {
            let (fate, at) = connection.fate();
            let waited = at - connection.since;
            match fate {
                Fate::Waiting => {
                    assert!(now - connection.since <= HOLD + TICK, "held for ever");
                    assert!(
                        !connection.left.is_cancelled() || now - connection.since < GRACE + TICK,
                        "a client that left is held"
                    );
                    let missed = self.available.values().any(|since| now - (*since).max(connection.since) > PATIENCE);
                    assert!(!missed, "held while a backend is available");
                }
                // The time from accept to the first look is real time, and a busy machine's.
                Fate::Closed(Closed::Timeout | Closed::DialFailed) => assert!(waited + REAL >= HOLD, "{waited:?}"),
                Fate::Closed(Closed::ClientLeft) => assert!(connection.left.is_cancelled()),
                Fate::Closed(Closed::Removed) => assert!(connection.removed),
                Fate::Closed(Closed::Shutdown) => assert!(self.ended.is_cancelled()),
                Fate::Closed(Closed::Malformed) => unreachable!("holding looks at nothing that is sent"),
                Fate::Closed(Closed::Unavailable) => unreachable!("nobody waits for minutes here"),
                // Judged at its moment.
                Fate::Closed(Closed::Limit) | Fate::Forwarded(_) | Fate::Finished => {}
            }
        }
        let waiting = || self.connections.iter().filter(|connection| connection.fate().0 == Fate::Waiting);
        let in_grace = |connection: &&Connection| connection.was_reachable && now - connection.since < GRACE + TICK;
        let (all, young) = (waiting().count(), waiting().filter(in_grace).count());
        let held = traffic.held as usize;
        assert!((all - young..=all).contains(&held), "{held} held, {all} wait, {young} of them have just come");
        assert!(traffic.held <= MAX_HELD);
        assert_eq!(traffic.forwarding, self.forwarded(None));
        assert_eq!(traffic.accepted, self.connections.len() as u64);
        let told = self.told.load(Ordering::Relaxed);
        assert_eq!(told > 0, held > 0, "{told} were told to be held, {held} are");
        let metrics = self.service.metrics();
        let gauges = (metrics.held.get(), metrics.forwarding.get());
        assert_eq!(gauges, (i64::from(traffic.held), i64::from(traffic.forwarding)));
        let most = self.concurrency.map_or(u32::MAX, |limit| limit * u32::from(BACKENDS));
        assert!(self.service.load().open() <= most);
    }

    /// The resolver ends: nothing is left of anything.
    async fn end(mut self) {
        self.ended.cancel();
        self.happen(&Event::Pass(1)).await;
        assert!(
            self.connections
                .iter()
                .all(|connection| !matches!(connection.fate().0, Fate::Waiting | Fate::Forwarded(_)))
        );
        let traffic = self.service.traffic();
        assert_eq!((traffic.held, traffic.forwarding, self.service.load().open()), (0, 0, 0));
    }
}

fn play(concurrency: Option<u32>, events: &[Event]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(concurrency);
        for event in events {
            world.happen(event).await;
        }
        world.end().await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_loses_a_connection_a_place_or_a_count(
        concurrency in prop_oneof![Just(None), Just(Some(1)), Just(Some(2))],
        events in prop::collection::vec(event(), 1..60),
    ) {
        play(concurrency, &events);
    }
}

/// One that refused may be back while the others are full.
#[test]
fn a_backend_that_refused_once_is_tried_again_while_the_others_are_full() {
    play(
        Some(1),
        &[
            Event::Health(0, Health::Up),
            Event::View(vec![0, 1]),
            Event::Arrive,
            Event::Pass(2_000),
            Event::Arrive,
            Event::Pass(300),
            Event::Health(1, Health::Up),
            Event::Pass(6_000),
        ],
    );
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_only_we_have_no_port_for_does_not_count_as_failed() {
    for (health, next) in [(Health::NoPort, 0), (Health::Refuses, 1)] {
        let mut world = World::new(None);
        world.happen(&Event::Health(0, health)).await;
        world.happen(&Event::View(vec![0])).await;
        world.happen(&Event::Arrive).await;
        world.happen(&Event::Pass(1)).await;
        let load = world.service.load();
        let _other = load.take(&[address(1)], None);
        let place = load.take(&[address(0), address(1)], None);
        assert_eq!(place.map(|place| place.backend()), Some(address(next)), "{health:?}");
    }
}

/// How many of 300 that are held are let go at the instant their target is ready, and after that without an end of any.
async fn let_go(concurrency: Concurrency) -> (usize, usize) {
    let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
    let service = Arc::new(Service::new("n", "s", metrics, Board::default().news()));
    let view = |targets: Vec<SocketAddr>| {
        let port = PortView { targets: targets.into(), ..PortView::default() };
        View { hold: HoldPolicy::default(), ports: [(PORT, port)].into(), ..View::default() }
    };
    service.set(view(Vec::new()));
    let dialer = Backends(Arc::new(Mutex::new([Health::Up; BACKENDS as usize])));
    let (reached, concurrency) = (Arc::new(Mutex::new(Vec::new())), Arc::new(concurrency));
    for _ in 0..300 {
        let (service, dialer, reached) = (Arc::clone(&service), dialer.clone(), Arc::clone(&reached));
        let concurrency = Arc::clone(&concurrency);
        tokio::spawn(async move {
            let client = Client { address: address(9), destination: address(9) };
            let concurrency = &*concurrency;
            let seeker = Seeker { service: &service, port: PORT, dialer, client, concurrency, since: Instant::now() };
            let it = reach(&seeker, pending()).await.unwrap();
            reached.lock().unwrap_or_else(PoisonError::into_inner).push(it);
        });
    }
    let count = || reached.lock().unwrap_or_else(PoisonError::into_inner).len();
    let pass = |time| tokio::time::sleep(time);
    pass(Duration::from_secs(1)).await;
    assert_eq!(count(), 0);
    service.set(view(vec![address(0)]));
    pass(Duration::from_secs(1)).await;
    let first = count();
    pass(Duration::from_secs(5)).await;
    (first, count())
}

/// A regression: held requests went all at once, more than their target takes.
#[tokio::test(start_paused = true)]
async fn requests_go_in_shares_and_none_is_kept_out_by_those_that_stay() {
    let request = || Concurrency::of_connections(None);
    assert_eq!(let_go(request()).await, (300, 300));
    let brief = request();
    brief.mark_brief();
    assert_eq!(let_go(brief).await, (250, 300));
    assert_eq!(let_go(Concurrency::of_requests(None)).await, (250, 300));
    assert_eq!(let_go(Concurrency::of_requests(Some(7))).await, (7, 7));
}
