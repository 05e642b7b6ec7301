//! One request of any kind, and the pool of connections that some kinds keep.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use http::HeaderMap;
use tokio::net::TcpStream;

use super::{grpc, http1, postgres, redis, websocket};
use crate::record::{Kind, Load, Micros, now};
use crate::target::PEER;

/// What is known of a request's connection, whether the request has an answer or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    /// When `connect()` began.
    pub(super) connecting: Micros,
    /// Whom the target sees.
    pub(super) peer: Option<IpAddr>,
}

/// A connection, with what is known of it.
pub(super) struct Known<T> {
    pub(super) inner: T,
    pub(super) answer: Answer,
}

/// Connections that are not in use.
pub(super) type Pool<T> = Arc<Mutex<Vec<Known<T>>>>;

/// The connection that was used last; `None` when there is none.
pub(super) fn take<T>(pool: &Pool<T>) -> Option<Known<T>> {
    pool.lock().unwrap_or_else(PoisonError::into_inner).pop()
}

/// Keeps a connection for the next request.
pub(super) fn put<T>(pool: &Pool<T>, connection: Known<T>) {
    pool.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
}

/// Makes the requests of a load.
#[derive(Clone)]
pub(super) enum Caller {
    Http1(http1::Caller),
    Grpc(grpc::Caller),
    WebSocket(Load),
    Redis(redis::Caller),
    Postgres(postgres::Caller),
}

impl Caller {
    pub(super) fn new(load: &Load) -> Self {
        match load.kind {
            Kind::NewConnection | Kind::KeepAlive => Self::Http1(http1::Caller::new(load)),
            Kind::Grpc => Self::Grpc(grpc::Caller::new(load)),
            Kind::WebSocket => Self::WebSocket(load.clone()),
            Kind::Redis => Self::Redis(redis::Caller::new(load)),
            Kind::Postgres => Self::Postgres(postgres::Caller::new(load)),
        }
    }

    /// One request, which carries `text` and is right if that comes back. `answer` tells of the connection in any case.
    pub(super) async fn call(&self, text: &str, answer: &mut Answer) -> Result<()> {
        match self {
            Self::Http1(caller) => caller.call(text, answer).await,
            Self::Grpc(caller) => caller.call(text, answer).await,
            Self::WebSocket(load) => websocket::call(load, text, answer).await,
            Self::Redis(caller) => caller.call(text, answer).await,
            Self::Postgres(caller) => caller.call(text, answer).await,
        }
    }
}

/// Connects, and notes when that began.
pub(super) async fn connect(load: &Load, answer: &mut Answer) -> Result<TcpStream> {
    answer.connecting = now();
    answer.peer = None;
    let stream = TcpStream::connect(load.address).await.context("connect")?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Whom the target says it sees.
pub(super) fn peer(headers: &HeaderMap) -> Option<IpAddr> {
    headers.get(PEER)?.to_str().ok()?.parse().ok()
}
