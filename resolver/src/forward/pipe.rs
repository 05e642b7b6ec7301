//! Pipes that carry bytes from one socket to another within the kernel (`splice(2)`).
//!
//! A connection has a pipe only while bytes are in it: a pipe that has been emptied goes back at once. So their number,
//! and the memory and the descriptors that they cost, are bounded whatever the number of connections; who gets none
//! copies in user space. Used by [`super::pump`] alone.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes that one pipe takes. Measured on loopback, a GiB costs half the processor time with this that it costs with the
/// default of 64 KiB; four times as much saves little more.
const CAPACITY: usize = 256 * 1024;

/// A quarter of what the kernel lets a user have before it cuts pipes down to two pages (`pipe-user-pages-soft`, 64 MiB):
/// all resolvers and everything else that runs as root on a node share that.
const MOST: usize = 64;

/// Empty pipes that are kept. Sockets are mostly drained at once, so few are in use at a time.
const SPARE: usize = 8;

/// The pipes of a process; clones are the same.
#[derive(Clone, Debug)]
pub struct Pipes(Arc<Mutex<Stock>>);

#[derive(Debug)]
struct Stock {
    spare: Vec<Ends>,
    /// All that are open, spare ones included.
    open: usize,
    most: usize,
    failing: bool,
}

#[derive(Debug)]
struct Ends {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Default for Pipes {
    fn default() -> Self {
        Self::at_most(MOST)
    }
}

impl Pipes {
    /// At most so many at once; with none, all bytes are copied in user space.
    pub fn at_most(most: usize) -> Self {
        Self(Arc::new(Mutex::new(Stock { spare: Vec::new(), open: 0, most, failing: false })))
    }

    /// Pipes that are open, those included that are kept for later.
    pub fn open(&self) -> usize {
        self.stock().open
    }

    /// An empty pipe; `None` when as many are open as may be, or the kernel gives none.
    pub(super) fn take(&self) -> Option<Pipe> {
        let mut stock = self.stock();
        let ends = match stock.spare.pop() {
            Some(ends) => ends,
            None if stock.open >= stock.most => return None,
            None => match Ends::open() {
                Ok(ends) => {
                    stock.open += 1;
                    stock.failing = false;
                    ends
                }
                Err(error) => {
                    if !std::mem::replace(&mut stock.failing, true) {
                        tracing::warn!(%error, "no pipe to forward bytes through: they are copied, which costs more CPU");
                    }
                    return None;
                }
            },
        };
        Some(Pipe { ends: Some(ends), filled: 0, pipes: self.clone() })
    }

    /// No code panics while it holds the lock; if one did, counts would still be whole.
    fn stock(&self) -> MutexGuard<'_, Stock> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ends {
    fn open() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Fails where the user has too many pipe pages already: a small pipe would be slower than copying.
        fcntl_setpipe_size(&writer, CAPACITY)?;
        Ok(Self { reader, writer })
    }
}

/// One pipe. Dropped empty, it is kept for others; with bytes in it, it is closed.
#[derive(Debug)]
pub(super) struct Pipe {
    /// Present until dropped.
    ends: Option<Ends>,
    filled: usize,
    pipes: Pipes,
}

impl Pipe {
    /// Takes what `from` has into this empty pipe; 0 at the end of its stream.
    pub(super) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        let ends = self.ends.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        // The pipe is empty, so that only an empty socket blocks, as `try_io` takes it.
        let filled = from.try_io(Interest::READABLE, || {
            Ok(retry_on_intr(|| splice(from, None, &ends.writer, None, CAPACITY, SpliceFlags::NONBLOCK))?)
        })?;
        self.filled += filled;
        Ok(filled)
    }

    /// Gives what is in this pipe to `to`, as far as that takes it.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let ends = self.ends.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        // The pipe is not empty, so that only a full socket blocks.
        let drained = to.try_io(Interest::WRITABLE, || {
            Ok(retry_on_intr(|| splice(&ends.reader, None, to, None, self.filled, SpliceFlags::NONBLOCK))?)
        })?;
        self.filled = self.filled.saturating_sub(drained);
        Ok(drained)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filled == 0
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut stock = self.pipes.stock();
        if self.is_empty() && stock.spare.len() < SPARE {
            stock.spare.extend(self.ends.take());
        } else {
            stock.open = stock.open.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_limited_and_empty_ones_are_used_again() {
        let pipes = Pipes::at_most(2);
        let (first, second) = (pipes.take(), pipes.take());
        assert!(first.is_some() && second.is_some() && pipes.take().is_none());
        drop(first);
        assert_eq!(pipes.open(), 2);
        assert!(pipes.take().is_some());
    }

    #[test]
    fn few_pipes_are_kept() {
        let pipes = Pipes::at_most(2 * SPARE);
        let all: Vec<Pipe> = std::iter::from_fn(|| pipes.take()).collect();
        assert_eq!((all.len(), pipes.open()), (2 * SPARE, 2 * SPARE));
        drop(all);
        assert_eq!(pipes.open(), SPARE);
    }
}
