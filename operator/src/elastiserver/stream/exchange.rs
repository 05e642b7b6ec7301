//! What is said on one stream, both ways, until it ends.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use elasti_api::message::{
    Asked, DecodeError, HEARTBEAT_INTERVAL, HEARTBEAT_TIMEOUT, MAX_LINE, OperatorMessage, ResolverMessage, decode,
    encode,
};
use elasti_api::summary::Summary;
use http_body_util::BodyExt;
use http_body_util::channel::Sender;
use hyper::body::Incoming;
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::codec::{AnyDelimiterCodec, AnyDelimiterCodecError, Decoder};

use super::Streams;
use crate::metrics::GaugeGuard;
use crate::publication::{Feed, FeedError, Line};
use crate::resolvers::{Ack, Activity, Connection, Identity, TooManyServices, Traffic};

/// A resolver that takes nothing of what it is sent for this long is ended: it would go on with an outdated state.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Lines are sent together until they are this long, in bytes.
const FRAME: usize = 8 << 10;

/// A timer that is late by this much says that this replica was too busy, or stopped, to hear anybody. To end streams for that would
/// make it busier: their resolvers begin anew.
const LATE: Duration = Duration::from_millis(100);

/// After this long even who has not been listened to is gone.
const LATE_MAX: Duration = Duration::from_secs(10);

/// A heartbeat follows the resolver's own, for which all is awake and a packet goes back anyway; if none has come for this long it goes alone.
const UNANSWERED: Duration = HEARTBEAT_INTERVAL.saturating_add(Duration::from_millis(125));

/// Why a stream has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("the resolver has closed it")]
    Closed,
    #[error("the resolver has been silent for {} s", HEARTBEAT_TIMEOUT.as_secs())]
    Silent,
    #[error("the resolver has taken nothing for {} s", STALL_TIMEOUT.as_secs())]
    Stalled,
    #[error("its first message was not Hello")]
    NoHello,
    #[error("the token was issued for pod '{token}', Hello says '{hello}'")]
    WrongPod { token: String, hello: String },
    #[error("a line is longer than {MAX_LINE} bytes")]
    LineTooLong,
    #[error(transparent)]
    TooManyServices(#[from] TooManyServices),
    #[error(transparent)]
    Feed(#[from] FeedError),
}

/// Speaks with the resolver whose token was issued for `pod`.
pub(super) async fn run(
    streams: &Streams,
    pod: &str,
    body: Incoming,
    sender: Sender<Bytes>,
    mut feed: Feed,
) -> Result<Infallible, Ended> {
    let mut lines = Lines::new(body);
    let (identity, known) = hello(&lines.next().await?, pod)?;
    if let Some(known) = known {
        feed.resume(&known);
    }
    tracing::info!(
        pod,
        node = identity.node,
        redirect_disabled = identity.redirect_disabled,
        "a resolver is connected"
    );
    let connection = streams.resolvers.connect(identity);
    let _counted = streams.metrics.stream();
    let (unclear, beats) = (Unclear::default(), Notify::new());
    let mut reader = Reader {
        streams,
        connection: &connection,
        unclear: &unclear,
        beats: &beats,
        newer: None,
        malformed_told: false,
        started: Instant::now(),
    };
    tokio::select! {
        ended = reader.run(&mut lines) => ended,
        ended = write(&connection, sender, feed, &unclear, &beats) => ended,
    }
}

/// Who speaks, and what it knows.
fn hello(line: &[u8], pod: &str) -> Result<(Identity, Option<Summary>), Ended> {
    match decode(line) {
        Ok(ResolverMessage::Hello { pod: hello, .. }) if hello != pod => {
            Err(Ended::WrongPod { token: pod.to_owned(), hello })
        }
        Ok(ResolverMessage::Hello { pod, node, addresses, redirect_disabled, known }) => {
            Ok((Identity { pod, node, addresses, redirect_disabled }, known.and_then(Summary::told)))
        }
        _ => Err(Ended::NoHello),
    }
}

/// Lines of a body. A whole line must come every [`HEARTBEAT_TIMEOUT`].
struct Lines {
    body: Incoming,
    codec: AnyDelimiterCodec,
    buffer: BytesMut,
}

impl Lines {
    fn new(body: Incoming) -> Self {
        let newline = || b"\n".to_vec();
        let codec = AnyDelimiterCodec::new_with_max_length(newline(), newline(), MAX_LINE);
        Self { body, codec, buffer: BytesMut::new() }
    }

    async fn next(&mut self) -> Result<Bytes, Ended> {
        let begun = Instant::now();
        let mut deadline = begun + HEARTBEAT_TIMEOUT;
        loop {
            match timeout_at(deadline.into(), self.line()).await {
                Ok(line) => return line,
                Err(_) if deadline.elapsed() < LATE || begun.elapsed() >= LATE_MAX => return Err(Ended::Silent),
                // It may have spoken all the time.
                Err(_) => deadline = Instant::now() + HEARTBEAT_INTERVAL,
            }
        }
    }

    async fn line(&mut self) -> Result<Bytes, Ended> {
        loop {
            match self.codec.decode(&mut self.buffer) {
                Ok(Some(line)) => return Ok(line),
                // Most of the time resolvers say little, and there may be a thousand of them: what a burst has needed is given back.
                Ok(None) if self.buffer.is_empty() => self.buffer = BytesMut::new(),
                Ok(None) => {}
                Err(AnyDelimiterCodecError::MaxChunkLengthExceeded) => return Err(Ended::LineTooLong),
                Err(AnyDelimiterCodecError::Io(_)) => return Err(Ended::Closed),
            }
            let frame = self.body.frame().await.and_then(Result::ok).ok_or(Ended::Closed)?;
            if let Some(data) = frame.data_ref() {
                self.buffer.extend_from_slice(data);
            }
        }
    }
}

/// Parts of which the resolver is to be told that what it said of them is not understood.
#[derive(Default)]
struct Unclear {
    parts: Mutex<BTreeSet<u16>>,
    news: Notify,
}

impl Unclear {
    fn add(&self, parts: Vec<u16>) {
        if !parts.is_empty() {
            self.parts().extend(parts);
            self.news.notify_one();
        }
    }

    /// Waits until there are some. Cancel safe.
    async fn next(&self) -> Vec<u16> {
        loop {
            self.news.notified().await;
            let parts = std::mem::take(&mut *self.parts());
            if !parts.is_empty() {
                return parts.into_iter().collect();
            }
        }
    }

    /// No code panics while it holds the lock.
    fn parts(&self) -> MutexGuard<'_, BTreeSet<u16>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Reader<'a> {
    streams: &'a Streams,
    connection: &'a Connection,
    unclear: &'a Unclear,
    /// Told of the resolver's heartbeats.
    beats: &'a Notify,
    /// Set once the resolver has sent something of a newer version.
    newer: Option<GaugeGuard>,
    malformed_told: bool,
    started: Instant,
}

impl Reader<'_> {
    async fn run(&mut self, lines: &mut Lines) -> Result<Infallible, Ended> {
        loop {
            let line = lines.next().await?;
            match decode(&line) {
                Ok(message) => self.take(message)?,
                Err(error) => self.skip(&error),
            }
        }
    }

    fn take(&self, message: ResolverMessage) -> Result<(), TooManyServices> {
        match message {
            ResolverMessage::Ack { uid, revision, listening, redirecting, holding, error } => {
                self.connection.acknowledged(&uid, Ack { revision, listening, redirecting, holding, error })
            }
            ResolverMessage::Traffic { uid, held, forwarding, accepted } => {
                self.connection.traffic(&uid, Traffic { held, forwarding, accepted })
            }
            ResolverMessage::Activity { uid, endpoints, open, opened: _, idle_ms, unknown } => {
                let now = Instant::now();
                // What lies before the machine's start is as long ago as can be told.
                let last = now.checked_sub(Duration::from_millis(idle_ms)).unwrap_or(self.started);
                self.connection.active(&uid, Activity { endpoints, open, last, unknown })
            }
            ResolverMessage::InEffect { parts } => self.in_effect(parts),
            ResolverMessage::Leaving => {
                self.connection.leaving();
                Ok(())
            }
            ResolverMessage::Heartbeat => {
                self.beats.notify_one();
                Ok(())
            }
            // A second Hello says nothing that the first has not said.
            ResolverMessage::Hello { .. } => Ok(()),
        }
    }

    /// As if each state of these parts had been acknowledged as it asks.
    fn in_effect(&self, parts: Vec<(u16, u64)>) -> Result<(), TooManyServices> {
        let redirects = self.connection.redirects();
        let (mut understood, mut unclear) = (Vec::new(), Vec::new());
        for (part, summary) in parts {
            let Some(asked) = self.streams.publication.asked(part, summary) else {
                unclear.push(part);
                continue;
            };
            understood.push(asked);
        }
        self.unclear.add(unclear);
        let acks = understood.iter().flat_map(|asked| asked.iter()).map(|(uid, asked)| {
            let Asked { revision, redirecting, holding } = *asked;
            let redirecting = redirecting && redirects;
            (uid.as_str(), Ack { revision, listening: true, redirecting, holding, error: None })
        });
        self.connection.acknowledged_all(acks)
    }

    /// What this build does not understand costs nothing but a line in the log, once a stream.
    fn skip(&mut self, error: &DecodeError) {
        let pod = self.connection.pod();
        match error {
            DecodeError::NewerVersion { .. } if self.newer.is_none() => {
                tracing::error!(pod, %error, "a resolver is newer than this operator; its message is ignored");
                self.newer = Some(self.streams.metrics.newer_resolver());
            }
            DecodeError::Malformed(_) if !std::mem::replace(&mut self.malformed_told, true) => {
                tracing::warn!(pod, %error, "a line of a resolver is ignored");
            }
            _ => {}
        }
    }
}

async fn write(
    connection: &Connection,
    mut sender: Sender<Bytes>,
    mut feed: Feed,
    unclear: &Unclear,
    beats: &Notify,
) -> Result<Infallible, Ended> {
    let mut tick = interval(UNANSWERED);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first is due at once, and Hello comes before it.
    tick.tick().await;
    let mut last = Instant::now();
    loop {
        let line = tokio::select! {
            line = feed.next() => gather(connection, line?, &mut feed)?,
            parts = unclear.next() => encode(&OperatorMessage::Unclear { parts }).map_err(FeedError::from)?.into(),
            () = beats.notified() => {
                if last.elapsed() < HEARTBEAT_INTERVAL / 2 {
                    continue;
                }
                tick.reset();
                last = Instant::now();
                feed.heartbeat()?
            }
            _ = tick.tick() => {
                last = Instant::now();
                feed.heartbeat()?
            }
        };
        match timeout(STALL_TIMEOUT, sender.send_data(line)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Ended::Closed),
            Err(_) => return Err(Ended::Stalled),
        }
    }
}

/// This line, and as many that are due as well as fit into one frame: a snapshot of thousands of lines is not thousands of frames.
fn gather(connection: &Connection, first: Line, feed: &mut Feed) -> Result<Bytes, FeedError> {
    let take = |line: &Line| {
        if let Some(uid) = &line.removed {
            connection.forget(uid);
        }
    };
    take(&first);
    let Some(second) = feed.ready()? else { return Ok(first.bytes) };
    let mut frame = BytesMut::with_capacity(FRAME);
    frame.extend_from_slice(&first.bytes);
    let mut next = Some(second);
    while let Some(line) = next {
        take(&line);
        frame.extend_from_slice(&line.bytes);
        next = if frame.len() < FRAME { feed.ready()? } else { None };
    }
    Ok(frame.freeze())
}
