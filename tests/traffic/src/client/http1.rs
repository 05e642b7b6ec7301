//! HTTP/1.1: a connection for each request, or a pool of connections that are kept.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;

use super::call::{Answer, Known, Pool, connect, peer, put, take};
use crate::record::{Kind, Load};

#[derive(Clone)]
pub(super) struct Caller {
    load: Load,
    pool: Pool<SendRequest<Empty<Bytes>>>,
}

impl Caller {
    pub(super) fn new(load: &Load) -> Self {
        Self { load: load.clone(), pool: Pool::default() }
    }

    pub(super) async fn call(&self, text: &str, answer: &mut Answer) -> Result<()> {
        let path = format!("/echo/{text}?pause={}", self.load.pause);
        let mut request = Request::get(path).header(http::header::HOST, "target").body(Empty::new())?;
        let (mut sender, response) = loop {
            let mut sender = self.connection(answer).await?;
            match sender.try_send_request(request).await {
                Ok(response) => break (sender, response),
                // The connection was closed before anything of the request was sent: it goes over another one.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error()).context("request"),
                },
            }
        };
        let status = response.status();
        answer.peer = peer(response.headers()).or(answer.peer);
        let body = response.into_body().collect().await.context("body")?.to_bytes();
        ensure!(status == StatusCode::OK, "{status}: {}", String::from_utf8_lossy(&body));
        ensure!(body == text, "wrong answer: {body:?}");
        // A response that closes its connection leaves it unfit for the next request.
        if self.load.kind == Kind::KeepAlive && sender.ready().await.is_ok() {
            put(&self.pool, Known { inner: sender, answer: *answer });
        }
        Ok(())
    }

    async fn connection(&self, answer: &mut Answer) -> Result<SendRequest<Empty<Bytes>>> {
        while let Some(mut kept) = take(&self.pool) {
            if kept.inner.ready().await.is_ok() {
                *answer = kept.answer;
                return Ok(kept.inner);
            }
        }
        let stream = connect(&self.load, answer).await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.context("handshake")?;
        tokio::spawn(connection);
        Ok(sender)
    }
}
