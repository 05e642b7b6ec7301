//! Whether a client has sent more than the request that is being answered: only then would it lose a request if the
//! connection closed after the answer. hyper reads ahead and does not say, so what it is given is watched.
//!
//! Unsure counts as more. [`super::io`] writes it, [`super::Session`] asks.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::net::TcpStream;
use tokio::time::Instant;

use super::chunks::Chunks;

/// What has come on one HTTP/1 connection; shared by its reader and its requests.
#[derive(Debug, Default)]
pub struct Inbox(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    /// Bytes that hyper has been given.
    received: u64,
    /// What the bytes so far make of the next one.
    line: Line,
    /// A request is being answered: what comes is its body, or another request.
    answering: bool,
    /// Where the head of the request ends that is, or will next be, answered; unknown if hyper had it before it asked
    /// for more.
    head_end: Option<u64>,
    /// What came after it, if it is chunked.
    chunks: Chunks,
    /// Since when there has been a part of a head.
    partial_since: Option<Instant>,
    /// The client has said that the request that is being answered is its last, whose body has this length.
    last: Option<u64>,
    /// The last request was answered, and nothing but it has come.
    over: bool,
    /// What comes is no HTTP any more.
    tunnel: bool,
    given_back: Option<(TcpStream, Vec<u8>)>,
}

impl Seen {
    fn is_all(&self, body: Option<u64>) -> bool {
        match (self.head_end, body) {
            (Some(end), Some(body)) => end.checked_add(body) == Some(self.received),
            (Some(_), None) => self.chunks == Chunks::End,
            (None, _) => false,
        }
    }
}

impl Inbox {
    /// These bytes have come.
    pub fn received(&self, bytes: &[u8], now: Instant) {
        let mut seen = self.seen();
        if seen.tunnel {
            return;
        }
        seen.over = false;
        let body = if !seen.answering && seen.head_end.is_none() {
            let end = seen.line.head_end(bytes);
            seen.head_end = end.map(|end| seen.received + end as u64);
            seen.partial_since.get_or_insert(now);
            end.map_or_else(Default::default, |end| &bytes[end..])
        } else {
            // Two bytes are all that the state depends on.
            seen.line.head_end(&bytes[bytes.len().saturating_sub(2)..]);
            bytes
        };
        seen.chunks.received(body);
        seen.received += bytes.len() as u64;
    }

    /// hyper has a request and asks for its answer.
    pub fn answering(&self) {
        let mut seen = self.seen();
        seen.answering = true;
        seen.partial_since = None;
    }

    /// The answer is complete.
    pub fn answered(&self) {
        let mut seen = self.seen();
        seen.over = seen.last.is_some_and(|body| seen.is_all(Some(body)));
        seen.answering = false;
        seen.head_end = None;
        seen.chunks = Chunks::default();
    }

    /// The client has said that it sends nothing after the request that is being answered, whose body has this length.
    pub fn set_last(&self, body: u64) {
        self.seen().last = Some(body);
    }

    /// The answer to the request turns the connection into a tunnel.
    pub fn tunnel(&self) {
        let mut seen = self.seen();
        seen.tunnel = true;
        seen.last = None;
    }

    /// Whether what comes is no HTTP any more.
    pub fn is_tunnel(&self) -> bool {
        self.seen().tunnel
    }

    /// Whether the client, as it has said, sends nothing any more.
    pub fn is_over(&self) -> bool {
        self.seen().over
    }

    /// Whether all that has come is the request that is being answered, whose body has this length, `None` if chunked.
    pub fn is_all(&self, body: Option<u64>) -> bool {
        self.seen().is_all(body)
    }

    /// Whether the next byte begins a head.
    pub fn between_requests(&self) -> bool {
        let seen = self.seen();
        !seen.tunnel && !seen.answering && seen.head_end.is_none() && seen.partial_since.is_none()
    }

    /// Gives a connection back that hyper cannot go on with, and what was read of it last.
    pub fn give_back(&self, stream: TcpStream, unread: Vec<u8>) {
        self.seen().given_back = Some((stream, unread));
    }

    /// The connection that was given back.
    pub fn take_back(&self) -> Option<(TcpStream, Vec<u8>)> {
        self.seen().given_back.take()
    }

    /// Since when the client has been sending one head.
    pub fn partial_since(&self) -> Option<Instant> {
        self.seen().partial_since
    }

    /// No code panics while it holds the lock; if one did, unsure would still count as more.
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Finds the empty line that ends a head (RFC 9112, section 2.2: a bare LF ends a line too).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Line {
    /// Something of it has come.
    #[default]
    Within,
    /// Nothing has.
    Begins,
    /// A CR has.
    BeginsWithCr,
}

impl Line {
    /// Where the first head that ends within `bytes` does. The state is that after all of them.
    pub fn head_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut found = None;
        for (at, byte) in bytes.iter().enumerate() {
            *self = match (byte, *self) {
                (b'\n', Self::Begins | Self::BeginsWithCr) => {
                    found.get_or_insert(at + 1);
                    Self::Begins
                }
                (b'\n', Self::Within) => Self::Begins,
                (b'\r', Self::Begins) => Self::BeginsWithCr,
                _ => Self::Within,
            };
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    fn after(parts: &[&[u8]]) -> Inbox {
        let inbox = Inbox::default();
        for part in parts {
            inbox.received(part, Instant::now());
        }
        inbox.answering();
        inbox
    }

    #[test]
    fn one_request_is_all_however_it_comes() {
        assert!(after(&[GET]).is_all(Some(0)));
        for cut in 1..GET.len() {
            assert!(after(&[&GET[..cut], &GET[cut..]]).is_all(Some(0)), "{cut}");
        }
    }

    #[test]
    fn a_second_request_is_more_than_one() {
        assert!(!after(&[GET, GET]).is_all(Some(0)));
        let both = [GET, GET].concat();
        for cut in 1..both.len() {
            assert!(!after(&[&both[..cut], &both[cut..]]).is_all(Some(0)), "{cut}");
        }
        let late = after(&[GET]);
        late.received(b"G", Instant::now());
        assert!(!late.is_all(Some(0)));
    }

    #[test]
    fn a_body_belongs_to_its_request() {
        let inbox = after(&[b"POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\nab"]);
        assert!(!inbox.is_all(Some(4)), "not yet all of it");
        inbox.received(b"\n\n", Instant::now());
        assert!(inbox.is_all(Some(4)));
        let chunked = after(&[b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]);
        assert!(chunked.is_all(None));
        chunked.received(GET, Instant::now());
        assert!(!chunked.is_all(None));
    }

    #[test]
    fn a_second_chunked_request_is_more_than_one_wherever_they_are_cut() {
        let bodies: [&[u8]; 4] = [
            b"0\r\n\r\n",
            b"3\r\nabc\r\n0\r\n\r\n",
            b"9;x=y\r\n\r\n0\r\n\r\n\r\n\r\n000\r\n\r\n",
            b"A\r\n0123456789\r\n0\r\nx-sum: 7\r\nx: y\r\n\r\n",
        ];
        for body in bodies {
            let request = [b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", body].concat();
            let both = [&*request, &request].concat();
            for cut in 1..request.len() {
                assert!(after(&[&request[..cut], &request[cut..]]).is_all(None), "{body:?} {cut}");
                assert!(!after(&[&request[..cut]]).is_all(None), "not yet all of it: {body:?} {cut}");
            }
            for cut in 1..both.len() {
                assert!(!after(&[&both[..cut], &both[cut..]]).is_all(None), "{body:?} {cut}");
            }
            let late = after(&[&request]);
            late.received(&request, Instant::now());
            assert!(!late.is_all(None), "{body:?}");
            let next = after(&[&request]);
            next.answered();
            next.received(&request, Instant::now());
            next.answering();
            assert!(next.is_all(None), "each for itself: {body:?}");
        }
    }

    #[test]
    fn the_next_request_is_looked_at_for_itself() {
        let inbox = after(&[b"POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\na\n\r\n"]);
        inbox.answered();
        inbox.received(GET, Instant::now());
        inbox.answering();
        assert!(inbox.is_all(Some(0)));
        inbox.answered();
        inbox.answering();
        assert!(!inbox.is_all(Some(0)), "hyper had it before it asked for more");
    }

    #[test]
    fn a_client_is_through_when_its_last_request_is_answered_and_nothing_else_has_come() {
        let inbox = after(&[GET]);
        inbox.answered();
        assert!(!inbox.is_over(), "it has not said so");
        inbox.received(GET, Instant::now());
        inbox.answering();
        inbox.set_last(0);
        assert!(!inbox.is_over(), "not answered");
        inbox.answered();
        assert!(inbox.is_over());
        inbox.received(b"\r\n", Instant::now());
        assert!(!inbox.is_over(), "more than it said");

        let inbox = after(&[b"POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\nab"]);
        inbox.set_last(4);
        inbox.answered();
        assert!(!inbox.is_over(), "the rest of its body is on its way");
    }

    #[test]
    fn a_head_in_parts_has_an_age() {
        let inbox = Inbox::default();
        assert!(inbox.partial_since().is_none());
        inbox.received(b"GET ", Instant::now());
        assert!(inbox.partial_since().is_some());
        inbox.received(&GET[4..], Instant::now());
        inbox.answering();
        assert!(inbox.partial_since().is_none());
    }
}
