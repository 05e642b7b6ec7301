//! One direction of a forwarded connection.
//!
//! Small messages are read and written, which is faster for them; once a read fills its chunk, bytes are spliced until a
//! splice moves less. Nothing is read while there is something to write, so that a slow reader slows its writer down, and
//! nothing is kept while there is nothing to write. Called by [`super::copy`].

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use prometheus::IntCounter;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::pipe::{Pipe, Pipes};

/// Bytes that are read at once. Requests and responses that a resolver sees are mostly smaller.
const CHUNK: usize = 16 * 1024;

/// What has been read and not been written yet.
#[derive(Debug)]
enum Underway {
    Nothing,
    Bytes { bytes: Box<[u8]>, written: usize },
    Piped(Pipe),
}

/// Moves bytes one way.
#[derive(Debug)]
pub(super) struct Pump<'a> {
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    pipes: &'a Pipes,
    moved: &'a IntCounter,
    underway: Underway,
    /// The last read filled all that there was to fill.
    bulk: bool,
    /// `from` has closed its sending side.
    ended: bool,
    /// `to` takes nothing any more.
    refused: bool,
}

impl<'a> Pump<'a> {
    /// Counts in `moved` what has been written to `to`.
    pub(super) fn new(from: ReadHalf<'a>, to: WriteHalf<'a>, pipes: &'a Pipes, moved: &'a IntCounter) -> Self {
        Self { from, to, pipes, moved, underway: Underway::Nothing, bulk: false, ended: false, refused: false }
    }

    /// Moves bytes until `from` closes its sending side, and closes that of `to`. May be dropped and called again.
    pub(super) async fn run(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Whether it was `to` that broke: what it has sent before that is still to be had.
    pub(super) fn refused(&self) -> bool {
        self.refused
    }

    /// Waits until `from` is broken. Only for when it has closed its sending side: before, reading shows it.
    pub(super) async fn broken(&self) {
        // An error of the waiting itself comes with the end of the runtime.
        drop(self.from.ready(Interest::ERROR).await);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_write(cx)).map_err(|error| self.refuse(error))?;
            if self.ended {
                return Pin::new(&mut self.to).poll_shutdown(cx);
            }
            ready!(self.from.as_ref().poll_read_ready(cx))?;
            if self.bulk && self.splice()? {
                continue;
            }
            ready!(self.poll_read(cx))?;
        }
    }

    /// Writes what is underway.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.underway {
                Underway::Nothing => return Poll::Ready(Ok(())),
                Underway::Bytes { bytes, written } => {
                    let now = ready!(Pin::new(&mut self.to).poll_write(cx, &bytes[*written..]))?;
                    self.moved.inc_by(now as u64);
                    *written += now;
                    if *written == bytes.len() {
                        self.underway = Underway::Nothing;
                    }
                }
                Underway::Piped(pipe) => {
                    let to: &TcpStream = self.to.as_ref();
                    ready!(to.poll_write_ready(cx))?;
                    match pipe.drain(to) {
                        Ok(now) => self.moved.inc_by(now as u64),
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                    if pipe.is_empty() {
                        self.underway = Underway::Nothing;
                    }
                }
            }
        }
    }

    /// Takes what there is into a pipe; `false` when that cannot be done and nothing has been taken.
    fn splice(&mut self) -> io::Result<bool> {
        let Some(mut pipe) = self.pipes.take() else {
            self.bulk = false;
            return Ok(false);
        };
        match pipe.fill(self.from.as_ref()) {
            Ok(0) => self.ended = true,
            Ok(filled) => {
                self.bulk = filled >= CHUNK;
                self.underway = Underway::Piped(pipe);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.bulk = false,
            // Forbidden, or unknown for this kind of socket: what is wrong with the connection shows when it is read.
            Err(error) if cannot_splice(error.kind()) => {
                self.bulk = false;
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn refuse(&mut self, error: io::Error) -> io::Error {
        self.refused = true;
        error
    }

    /// Reads once, and writes as much of it as `to` takes at once.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut chunk = [const { MaybeUninit::uninit() }; CHUNK];
        let mut chunk = ReadBuf::uninit(&mut chunk);
        ready!(Pin::new(&mut self.from).poll_read(cx, &mut chunk))?;
        self.ended = chunk.filled().is_empty();
        self.bulk = chunk.remaining() == 0;
        let mut rest = chunk.filled();
        while !rest.is_empty() {
            match Pin::new(&mut self.to).poll_write(cx, rest).map_err(|error| self.refuse(error))? {
                Poll::Ready(now) => {
                    self.moved.inc_by(now as u64);
                    rest = &rest[now..];
                }
                Poll::Pending => {
                    self.underway = Underway::Bytes { bytes: rest.into(), written: 0 };
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn cannot_splice(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::InvalidInput | ErrorKind::PermissionDenied | ErrorKind::Unsupported)
}
