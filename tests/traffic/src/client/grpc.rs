//! Streams both ways over one HTTP/2 connection, as a gRPC channel has it; a new connection when the server says GOAWAY.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use http_body_util::channel::{Channel, Sender};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::Mutex;

use super::call::{Answer, Known, connect, peer};
use crate::record::Load;

type Body = Channel<Bytes, std::convert::Infallible>;

#[derive(Clone)]
pub(super) struct Caller {
    load: Load,
    /// Locked while a connection is made, so that requests which arrive meanwhile share it.
    channel: Arc<Mutex<Option<Known<SendRequest<Body>>>>>,
}

impl Caller {
    pub(super) fn new(load: &Load) -> Self {
        Self { load: load.clone(), channel: Arc::default() }
    }

    pub(super) async fn call(&self, text: &str, answer: &mut Answer) -> Result<()> {
        let (messages, body) = Channel::new(1);
        let request =
            Request::post("http://target/stream").header(http::header::CONTENT_TYPE, "application/grpc").body(body)?;
        let expected = text.repeat(self.load.messages as usize);
        let (response, ()) = tokio::join!(self.request(request, answer), self.send(text, messages));
        let response = response?;
        let peer = peer(response.headers()).or(answer.peer);
        answer.peer = peer;
        if let Some(channel) = &mut *self.channel.lock().await
            && channel.answer.connecting == answer.connecting
        {
            channel.answer.peer = peer;
        }
        let status = response.status();
        let headers = response.headers().clone();
        let body = response.into_body().collect().await.context("stream")?;
        let trailers = body.trailers().cloned().unwrap_or(headers);
        let bytes = body.to_bytes();
        let grpc_status = trailers.get("grpc-status").and_then(|status| status.to_str().ok()).unwrap_or("none");
        ensure!(status.is_success() && grpc_status == "0", "{status}, grpc-status {grpc_status}");
        ensure!(bytes == expected, "wrong answer: {} bytes of {}", bytes.len(), expected.len());
        Ok(())
    }

    async fn request(&self, mut request: Request<Body>, answer: &mut Answer) -> Result<Response<Incoming>> {
        loop {
            let mut sender = self.connection(answer).await?;
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response),
                // The connection was closed before anything of the request was sent: it goes over another one.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error()).context("request"),
                },
            }
        }
    }

    async fn send(&self, text: &str, mut messages: Sender<Bytes, std::convert::Infallible>) {
        for number in 0..self.load.messages {
            if number > 0 {
                tokio::time::sleep(Duration::from_micros(self.load.pause)).await;
            }
            // Whether the stream broke is seen by its answer.
            if messages.send(Frame::data(Bytes::from(text.to_owned()))).await.is_err() {
                return;
            }
        }
    }

    async fn connection(&self, answer: &mut Answer) -> Result<SendRequest<Body>> {
        let mut channel = self.channel.lock().await;
        if let Some(known) = &mut *channel
            && known.inner.ready().await.is_ok()
        {
            *answer = known.answer;
            return Ok(known.inner.clone());
        }
        let stream = connect(&self.load, answer).await?;
        let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.context("handshake")?;
        tokio::spawn(connection);
        *channel = Some(Known { inner: sender.clone(), answer: *answer });
        Ok(sender)
    }
}
