//! Local ports, when there are no more to one target.
//!
//! Whoever closes first keeps the port of the connection for a minute (`TIME_WAIT`), and to targets the resolver often is: after
//! some hundreds of connections a second to one pod the kernel finds none. It takes one that rests all the same if it is bound by
//! name and its last connection had timestamps, which tell the two apart (RFC 6191, and `tcp_twsk_unique` of `net/ipv4/tcp_ipv4.c`).
//! What `net.ipv4.tcp_tw_reuse` allows would be the same, but pods may not set it. Called by [`super::Dialer`].

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{TcpSocket, TcpStream};

/// The ports that the kernel picks from, of this network namespace.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Ports that are tried. Where closed connections have taken them all, the first one does.
const TRIES: u32 = 32;

/// Pause between two log lines.
const QUIET: Duration = Duration::from_mins(1);

/// When it was last said that there is none.
static SAID: Mutex<Option<Instant>> = Mutex::new(None);

/// Connects to `address` from a port whose last connection is closed; if none is found, fails with `error`, that of the kernel.
pub(super) async fn connect(
    socket: impl Fn() -> io::Result<TcpSocket>,
    address: SocketAddr,
    error: io::Error,
) -> io::Result<TcpStream> {
    let Some(range) = std::fs::read_to_string(RANGE).ok().as_deref().and_then(range) else { return Err(error) };
    let any = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    for _ in 0..TRIES {
        let socket = socket()?;
        let connected = match socket.bind(SocketAddr::new(any, fastrand::u16(range.clone()))) {
            Ok(()) => socket.connect(address).await,
            Err(error) => Err(error),
        };
        match connected {
            // A listener has it, or an open connection to this target.
            Err(error) if matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable) => {}
            connected => return connected,
        }
    }
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.is_none_or(|said| said.elapsed() > QUIET) {
        *said = Some(Instant::now());
        tracing::warn!(target = %address, %error, "no local port, or no address, is left for connections to one target");
    }
    Err(error)
}

/// Of two numbers, the first and the last; `None` when the text is not that.
fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(|number| number.parse().ok());
    let (first, last) = (numbers.next()??, numbers.next()??);
    (first <= last).then_some(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_two_numbers() {
        assert_eq!(range("1024\t19999\n"), Some(1024..=19999));
        for text in ["", "1024", "19999 1024", "a b"] {
            assert_eq!(range(text), None, "{text:?}");
        }
    }
}
