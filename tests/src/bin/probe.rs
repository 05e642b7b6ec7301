//! A client and a server for tests: says what it sees of its connections.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use elasti_resolver::forward::Dialer;
use resolver_ebpf::{NOTES_LEN, Note};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Longer than any local connection takes, shorter than a test's patience.
const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Parser)]
enum Probe {
    /// Listens on every address, prints the port, greets every connection
    Serve {
        name: String,
        /// Any port that is free
        #[arg(default_value_t = 0)]
        port: u16,
    },
    /// Listens on every address, prints the port, and keeps every connection without a word
    Keep,
    /// Connects, and sends each line that it reads; ends with its input
    Talk { address: SocketAddr },
    /// Connects, prints the peer that the socket names and the greeting
    Connect {
        /// Whom to dial, one after the other with the same socket
        addresses: Vec<SocketAddr>,
        /// Dial an IPv4 address with an IPv6 socket
        #[arg(long)]
        mapped: bool,
        /// Mark the socket first
        #[arg(long, default_value_t = 0)]
        mark: u32,
        /// The client's own port; 0 is any
        #[arg(long, default_value_t = 0)]
        from: u16,
        /// Connect a UDP socket
        #[arg(long)]
        udp: bool,
    },
    /// Opens connections one after the other as the resolver does, is the first to close each, and prints how many there were
    Dial { address: SocketAddr, count: u32 },
    /// Connects to the first address, then makes sockets until the note of one would be where that of the first is, connects it
    /// to the second address, and prints the peers that both name
    Displace { first: SocketAddr, second: SocketAddr },
}

fn main() -> Result<()> {
    match Probe::parse() {
        Probe::Serve { name, port } => serve(&name, port),
        Probe::Keep => keep(),
        Probe::Talk { address } => talk(address),
        Probe::Connect { addresses, mapped, mark, from, udp } => {
            match connect(&addresses, mapped, mark, from, udp) {
                Ok(seen) => println!("{seen}"),
                Err(error) => println!("error {error}"),
            }
            Ok(())
        }
        Probe::Dial { address, count } => {
            match dial(address, count) {
                Ok(()) => println!("{count}"),
                Err(error) => println!("error {error}"),
            }
            Ok(())
        }
        Probe::Displace { first, second } => displace(first, second),
    }
}

fn serve(name: &str, port: u16) -> Result<()> {
    let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("{}", listener.local_addr()?.port());
    for stream in listener.incoming() {
        stream?.write_all(name.as_bytes())?;
    }
    Ok(())
}

fn keep() -> Result<()> {
    let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    println!("{}", listener.local_addr()?.port());
    for stream in listener.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
    }
    Ok(())
}

fn talk(address: SocketAddr) -> Result<()> {
    let mut stream = std::net::TcpStream::connect(address)?;
    println!("connected");
    for line in std::io::stdin().lines() {
        stream.write_all(line?.as_bytes())?;
        println!("sent");
    }
    Ok(())
}

fn connect(addresses: &[SocketAddr], mapped: bool, mark: u32, from: u16, udp: bool) -> Result<String> {
    let mut seen = String::new();
    let six = mapped || addresses.iter().any(SocketAddr::is_ipv6);
    let domain = if six { Domain::IPV6 } else { Domain::IPV4 };
    let (kind, protocol) = if udp { (Type::DGRAM, Protocol::UDP) } else { (Type::STREAM, Protocol::TCP) };
    let mut socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    if from != 0 {
        let any: IpAddr = if six { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        socket.bind(&SocketAddr::new(any, from).into())?;
    }
    for (number, address) in addresses.iter().enumerate() {
        if number > 0 {
            // AF_UNSPEC: connect(2) dissolves the association, so that the same socket can be connected again.
            socket2::SockRef::from(&socket).connect(&unspecified())?;
        }
        let address = match (address.ip(), mapped) {
            (IpAddr::V4(ip), true) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
            _ => *address,
        };
        socket.connect(&address.into())?;
        let peer = socket.peer_addr()?.as_socket().map(|peer| peer.to_string()).unwrap_or_default();
        let mut greeting = String::new();
        if !udp {
            socket.read_to_string(&mut greeting)?;
        }
        format!("{peer} {greeting}").trim().clone_into(&mut seen);
    }
    Ok(seen)
}

#[tokio::main(flavor = "current_thread")]
async fn dial(address: SocketAddr, count: u32) -> Result<()> {
    for _ in 0..count {
        let mut stream = Dialer::default().connect(address, &[], TIMEOUT).await?;
        stream.shutdown().await?;
        stream.read_to_end(&mut Vec::new()).await?;
    }
    Ok(())
}

/// Laps around the notes: the numbers of one may have gone to another CPU.
const LAPS: u32 = 64;

fn displace(first: SocketAddr, second: SocketAddr) -> Result<()> {
    let tcp = |address| Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP));
    let older = tcp(first)?;
    older.connect(&first.into())?;
    let place = Note::place(older.cookie()?);
    for _ in 0..LAPS * NOTES_LEN {
        let newer = tcp(second)?;
        if Note::place(newer.cookie()?) == place {
            newer.connect(&second.into())?;
            let peers = [older, newer].map(|socket| socket.peer_addr().ok().and_then(|peer| peer.as_socket()));
            println!("{}", peers.map(|peer| peer.map_or_else(String::new, |peer| peer.to_string())).join(" "));
            return Ok(());
        }
    }
    anyhow::bail!("no socket has displaced the first")
}

fn unspecified() -> socket2::SockAddr {
    use socket2::SockAddrStorage;
    let storage = SockAddrStorage::zeroed();
    let length = storage.size_of();
    // SAFETY: all zero is AF_UNSPEC, whose other bytes have no meaning.
    #[expect(unsafe_code, reason = "socket2 has no name for AF_UNSPEC")]
    unsafe {
        socket2::SockAddr::new(storage, length)
    }
}
