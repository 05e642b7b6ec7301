//! The header of the PROXY protocol, version 2: tells a target who its client is, ahead of the client's first byte.
//!
//! Written as chapter 2.2 of the specification has it (<https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>):
//! command PROXY, TCP, no extensions. It never changes: 28 bytes for IPv4, 52 for IPv6. Called right after a dial.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// What no other protocol begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2; the addresses are those of the connection that is proxied.
const VERSION_AND_COMMAND: u8 = 0x21;

/// `AF_INET`, `STREAM`.
const TCP_OVER_IPV4: u8 = 0x11;

/// `AF_INET6`, `STREAM`.
const TCP_OVER_IPV6: u8 = 0x21;

/// The header for a connection that `client` opened to `destination`.
///
/// IPv4 in its IPv6 form is written as IPv4. The protocol has one family for both addresses: where they differ, both
/// are written as IPv6, so that the client's address is kept, as HAProxy does.
pub fn header(client: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let ports = [client.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    match (client.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(client), IpAddr::V4(destination)) => {
            framed(TCP_OVER_IPV4, &[&client.octets(), &destination.octets(), &ports])
        }
        (client, destination) => {
            framed(TCP_OVER_IPV6, &[&as_ipv6(client).octets(), &as_ipv6(destination).octets(), &ports])
        }
    }
}

fn as_ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

fn framed(family: u8, parts: &[&[u8]]) -> Vec<u8> {
    let addresses = parts.concat();
    // 12 or 36 bytes; the length has two.
    let [.., high, low] = addresses.len().to_be_bytes();
    [&SIGNATURE[..], &[VERSION_AND_COMMAND, family, high, low], &addresses].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proxy_header::{ParseConfig, ProxiedAddress, ProxyHeader};

    use super::*;

    fn of(client: &str, destination: &str) -> Vec<u8> {
        header(client.parse().unwrap(), destination.parse().unwrap())
    }

    #[test]
    fn ipv4_byte_for_byte() {
        let expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x0a\xf4\x01\x02\x0a\x60\x00\x01\xc3\x50\x00\x50";
        assert_eq!(of("10.244.1.2:50000", "10.96.0.1:80"), expected);
        assert_eq!(of("[::ffff:10.244.1.2]:50000", "10.96.0.1:80"), expected);
        assert_eq!(of("[::ffff:10.244.1.2]:50000", "[::ffff:10.96.0.1]:80"), expected);
    }

    #[test]
    fn ipv6_byte_for_byte() {
        let expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24\
            \xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\
            \xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\xc3\x50\x01\xbb";
        assert_eq!(of("[fd00::1]:50000", "[fd00::2]:443"), expected);
    }

    #[test]
    fn of_two_families_the_ipv4_address_is_kept_in_its_ipv6_form() {
        let expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24\
            \x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x0a\xf4\x01\x02\
            \xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\xc3\x50\x01\xbb";
        assert_eq!(of("10.244.1.2:50000", "[fd00::2]:443"), expected);
    }

    proptest! {
        #[test]
        fn another_parser_reads_the_addresses_and_nothing_of_what_follows(
            client: (IpAddr, u16), destination: (IpAddr, u16), payload: Vec<u8>
        ) {
            let mut bytes = header(client.into(), destination.into());
            let length = bytes.len();
            bytes.extend(&payload);
            let (read, consumed) = ProxyHeader::parse(&bytes, ParseConfig::default()).unwrap();
            prop_assert_eq!(consumed, length);
            let ProxiedAddress { source, destination: reached, protocol } = read.proxied_address().unwrap();
            prop_assert_eq!(*protocol, proxy_header::Protocol::Stream);
            for (read, written) in [(source, client), (reached, destination)] {
                prop_assert_eq!(read.ip().to_canonical(), written.0.to_canonical());
                prop_assert_eq!(read.port(), written.1);
            }
        }
    }
}
