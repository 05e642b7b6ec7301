//! The program in pods and on hosts of the test cluster: the target, or a client.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::Parser;
use elasti_traffic::client;
use elasti_traffic::target::{self, OnTerm};

/// A target that speaks several protocols, and its clients.
#[derive(Parser)]
enum Arguments {
    /// Answer HTTP/1.1, h2c and WebSocket until SIGTERM
    Serve {
        /// Port to listen on, of every address
        #[arg(long, default_value_t = 80)]
        port: u16,
        /// What SIGTERM does
        #[arg(long, value_enum, default_value_t = OnTerm::Drain)]
        on_term: OnTerm,
        /// Milliseconds after SIGTERM for which a draining target goes on accepting
        #[arg(long, default_value_t = 3000)]
        linger: u64,
    },
    /// Take commands from standard input and print records
    Client,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse() {
        Arguments::Serve { port, on_term, linger } => {
            let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            target::serve(address, on_term, Duration::from_millis(linger)).await
        }
        Arguments::Client => client::run().await,
    }
}
