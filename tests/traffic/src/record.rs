//! What clients are told and what they say, one JSON object a line.
//!
//! Times are microseconds of the machine's monotonic clock, which all network namespaces and pods of one machine share.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// Microseconds of `CLOCK_MONOTONIC`.
pub type Micros = u64;

/// The time.
pub fn now() -> Micros {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default() / 1000
}

/// How a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// HTTP/1.1, a connection for each request.
    NewConnection,
    /// HTTP/1.1 over a pool of connections that are kept.
    KeepAlive,
    /// A stream both ways over one HTTP/2 connection, as gRPC does it.
    Grpc,
    /// A WebSocket for each request, whose messages are echoed.
    WebSocket,
    /// Redis over a pool of connections that are kept.
    Redis,
    /// PostgreSQL over a pool of connections that are kept.
    Postgres,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 6] =
        [Self::NewConnection, Self::KeepAlive, Self::Grpc, Self::WebSocket, Self::Redis, Self::Postgres];

    /// The kinds that [`crate::target`] answers.
    pub const OF_TARGET: [Self; 4] = [Self::NewConnection, Self::KeepAlive, Self::Grpc, Self::WebSocket];

    /// A word for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::NewConnection => "new connection",
            Self::KeepAlive => "keep-alive",
            Self::Grpc => "gRPC stream",
            Self::WebSocket => "WebSocket",
            Self::Redis => "Redis",
            Self::Postgres => "PostgreSQL",
        }
    }
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Command {
    /// Begin a load.
    Start(Load),
    /// Let no more requests arrive; those that have arrived go on, and [`Said::Done`] follows the last one.
    Stop {
        /// The load.
        load: u64,
    },
}

/// Requests of one kind that arrive at a fixed rate, whatever becomes of those before them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Load {
    /// Its number, unique in a run.
    pub load: u64,
    /// Whom to call.
    pub address: SocketAddr,
    /// How.
    pub kind: Kind,
    /// Requests that arrive at most; the load stops by itself after them.
    pub most: u64,
    /// Microseconds from arrival to arrival. The first one comes at once.
    pub interval: Micros,
    /// Microseconds by which all but the first are late, so that loads which begin together do not stay in step.
    pub phase: Micros,
    /// Messages of a request: streams have several, other requests one.
    pub messages: u32,
    /// Microseconds from message to message, or that the target lets an answer wait.
    pub pause: Micros,
}

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Said {
    /// It takes commands.
    Ready,
    /// A request has ended.
    Request(Record),
    /// A stopped load has ended, and all its connections are closed.
    Done {
        /// The load.
        load: u64,
    },
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Its load.
    pub load: u64,
    /// Its kind.
    pub kind: Kind,
    /// When it was due.
    pub arrived: Micros,
    /// When `connect()` began on its connection, which may have served others before.
    pub connecting: Micros,
    /// Who the target said has called it; `None` if it never answered on this connection. A resolver's address shows
    /// that the connection is one that a resolver forwards.
    pub peer: Option<IpAddr>,
    /// When it had its answer or its error.
    pub ended: Micros,
    /// Why it has not the right answer; `None` when it has.
    pub error: Option<String>,
}
