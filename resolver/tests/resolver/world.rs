//! One resolver, one operator, and what tests ask of them.

use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use elasti_api::message::ServiceState;
use elasti_api::names;
use elasti_resolver::app::{self, Redirection};
use elasti_resolver::capacity::Limits;
use elasti_resolver::config::{Arguments, Config};
use elasti_resolver::fallback::Patience;
use elasti_runtime::telemetry::{Format, Level, subscriber};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::operator::{Identity, Operator};

pub(crate) use elasti_stand::{DEADLINE, soon, state};

pub(crate) struct World {
    pub(crate) operator: Operator,
    pub(crate) identity: Identity,
    pub(crate) shutdown: CancellationToken,
    pub(crate) resolver: tokio::task::JoinHandle<()>,
    admin: SocketAddr,
    pub(crate) proxied: SocketAddr,
}

impl Drop for World {
    fn drop(&mut self) {
        self.resolver.abort();
    }
}

impl World {
    pub(crate) async fn new(services: Vec<ServiceState>) -> Self {
        Self::with(services, off(), Patience::default()).await
    }

    pub(crate) async fn with(services: Vec<ServiceState>, redirection: Redirection, patience: Patience) -> Self {
        let identity = Identity::new();
        let operator = Operator::start(&identity, 0, services).await;
        Self::start(identity, operator, redirection, patience).await
    }

    /// A resolver that may use no more than this.
    pub(crate) async fn limited(services: Vec<ServiceState>, limits: Limits) -> Self {
        let identity = Identity::new();
        let operator = Operator::start(&identity, 0, services).await;
        Self::launch(identity, operator, off(), Patience::default(), Some(limits)).await
    }

    pub(crate) async fn start(
        identity: Identity,
        operator: Operator,
        redirection: Redirection,
        patience: Patience,
    ) -> Self {
        Self::launch(identity, operator, redirection, patience, None).await
    }

    async fn launch(
        identity: Identity,
        operator: Operator,
        redirection: Redirection,
        patience: Patience,
        limits: Option<Limits>,
    ) -> Self {
        let program = std::iter::once("elasti-resolver".to_owned());
        let flags = program.chain(elasti_stand::flags(&operator, &identity));
        let arguments: Arguments =
            elasti_runtime::config::parse(flags.map(Into::into)).expect("flags of the stand are known");
        let config = Config { patience, limits, ..Config::new(&arguments).unwrap() };
        let (_, levels) = subscriber(Format::Text, &Level::default());
        let bound = app::build(config, redirection, levels).await.unwrap();
        let admin = SocketAddr::from((Ipv6Addr::LOCALHOST, bound.admin.port()));
        let proxied = SocketAddr::from((Ipv6Addr::LOCALHOST, bound.proxied.port()));
        let shutdown = CancellationToken::new();
        let resolver = tokio::spawn(bound.run(shutdown.clone()));
        Self { operator, identity, shutdown, resolver, admin, proxied }
    }

    /// The body of an admin page.
    pub(crate) async fn page(&self, path: &str) -> String {
        let mut admin = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        admin.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        admin.read_to_string(&mut reply).await.unwrap();
        reply
    }

    /// The sum of all series of a metric whose line contains `label`.
    pub(crate) async fn metric(&self, name: &str, label: &str) -> f64 {
        let page = self.page("/metrics").await;
        let series = page.lines().filter(|line| line.starts_with(name) && line.contains(label));
        series.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }

    /// Waits until a metric has reached this value.
    pub(crate) async fn metric_at_least(&self, name: &str, label: &str, value: f64) {
        let reached = async {
            while self.metric(name, label).await < value {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon(reached).await;
    }

    /// Waits until a metric has this value.
    #[expect(clippy::float_cmp, reason = "counts are whole numbers")]
    pub(crate) async fn metric_is(&self, name: &str, label: &str, value: f64) {
        let reached = async {
            while self.metric(name, label).await != value {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let reached = tokio::time::timeout(DEADLINE, reached).await.is_ok();
        assert!(reached, "{name} {label} is not {value}:\n{}", self.page("/metrics").await);
    }
}

pub(crate) fn off() -> Redirection {
    Redirection::Off("in tests".to_owned())
}

/// A port that nobody else in this process takes, outside of the ephemeral range.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Other test processes start elsewhere in the range.
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) + std::process::id() % 100 * 100;
        let port = names::INTERCEPTION_PORT_MIN + u16::try_from(offset % 12_000).unwrap();
        if std::net::TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

pub(crate) async fn dial(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).await.unwrap()
}

/// The clock of this test's runtime, which is the resolver's too, stands until it goes on: no timer ends, unless
/// [`tokio::time::advance`] says so. When nothing has come of that before the deadline, as the machine's clock has it, it jumps from
/// timer to timer, so that a test that waits in vain fails. Needs a runtime of one thread.
pub(crate) struct StandingClock {
    since: Instant,
    /// Tells the task that keeps it standing to end.
    _goes_on: std::sync::mpsc::Sender<()>,
}

impl StandingClock {
    pub(crate) fn new() -> Self {
        let (goes_on, waits) = std::sync::mpsc::channel();
        tokio::time::pause();
        // While it runs, Tokio does not take an idle runtime for a reason to jump to the next timer.
        tokio::task::spawn_blocking(move || waits.recv_timeout(DEADLINE));
        Self { since: Instant::now(), _goes_on: goes_on }
    }

    /// Lets it go on; says by how much it has been put forward.
    pub(crate) fn goes_on(self) -> Duration {
        let passed = self.since.elapsed();
        tokio::time::resume();
        passed
    }
}

/// Waits for a reset.
pub(crate) async fn is_reset(client: &mut TcpStream) {
    let end = soon(client.read(&mut [0; 64])).await;
    assert_eq!(end.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
}
