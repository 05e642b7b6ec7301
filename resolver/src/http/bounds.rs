//! How much hyper may keep of what one side of a connection has sent and the other has not taken. Its defaults are megabytes for
//! each connection, so that some hundreds whose clients do not read would fill the resolver's memory, and the kernel would end it
//! with all that it holds. (It does not for what waits in sockets: these get no more when memory is short.)
//!
//! Called by all that serve clients, [`super::serve`], [`super::refuse`] and [`crate::proxy`], and by [`super::upstream`].

use hyper::{client, server};
use hyper_util::rt::TokioExecutor;

/// Bytes that a client of HTTP/1 may be ahead of its target; the longest head of a request too. Proxies as a rule take shorter
/// heads (Envoy 60 KiB, nginx 32 KiB).
const BUFFER: usize = 64 << 10;

/// Bytes that a target of HTTP/1 may be ahead of its client. With a quarter of it large bodies cost 2.5 times the CPU time.
const BODY: usize = 256 << 10;

/// Bytes of one stream of HTTP/2 that may be on their way to us, and as many that may wait to be sent on. Within a cluster, where
/// a round trip takes a millisecond at most, 64 MB a second.
const STREAM: u32 = 64 << 10;

/// Bytes of all streams of a connection that may be on their way to us: some that are not read do not keep the others waiting.
const CONNECTION: u32 = 4 * STREAM;

/// Of a client's connection that speaks HTTP/1.
pub fn http1_server() -> server::conn::http1::Builder {
    let mut builder = server::conn::http1::Builder::new();
    builder.max_buf_size(BUFFER);
    builder
}

/// Of a client's connection that speaks HTTP/2.
pub fn http2_server() -> server::conn::http2::Builder<TokioExecutor> {
    let mut builder = server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(STREAM)
        .initial_connection_window_size(CONNECTION)
        .max_send_buf_size(STREAM as usize);
    builder
}

/// Of a connection to a target that speaks HTTP/1.
pub fn http1_client() -> client::conn::http1::Builder {
    let mut builder = client::conn::http1::Builder::new();
    builder.max_buf_size(BODY);
    builder
}

/// Of a connection to a target that speaks HTTP/2.
pub fn http2_client() -> client::conn::http2::Builder<TokioExecutor> {
    let mut builder = client::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(STREAM)
        .initial_connection_window_size(CONNECTION)
        .max_send_buf_size(STREAM as usize);
    builder
}
