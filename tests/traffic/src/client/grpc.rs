//! Streams both ways over one HTTP/2 connection, as a gRPC channel has it; a new connection when the server says GOAWAY.
//!
//! By h2 itself: hyper does not tell a request that was never sent from one that the server broke off.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest, handshake};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request};
use tokio::sync::Mutex;

use super::call::{Answer, Known, connect, peer};
use crate::record::Load;

#[derive(Clone)]
pub(super) struct Caller {
    load: Load,
    /// Locked while a connection is made, so that requests which arrive meanwhile share it.
    channel: Arc<Mutex<Option<Known<SendRequest<Bytes>>>>>,
}

impl Caller {
    pub(super) fn new(load: &Load) -> Self {
        Self { load: load.clone(), channel: Arc::default() }
    }

    pub(super) async fn call(&self, text: &str, answer: &mut Answer) -> Result<()> {
        let (response, messages) = self.request(answer).await?;
        let expected = text.repeat(self.load.messages as usize);
        let (received, ()) = tokio::join!(self.receive(response, answer), self.send(text, messages));
        let (bytes, trailers) = received?;
        let status = trailers.get("grpc-status").and_then(|status| status.to_str().ok()).unwrap_or("none");
        ensure!(status == "0", "grpc-status {status}");
        ensure!(bytes == expected, "wrong answer: {} bytes of {}", bytes.len(), expected.len());
        Ok(())
    }

    /// Opens a stream; on another connection if the server has said GOAWAY before that.
    async fn request(&self, answer: &mut Answer) -> Result<(ResponseFuture, SendStream<Bytes>)> {
        loop {
            let request = Request::post("http://target/stream").header("content-type", "application/grpc").body(())?;
            match self.connection(answer).await?.send_request(request, false) {
                Ok(stream) => return Ok(stream),
                Err(error) if error.is_go_away() && error.is_remote() => {}
                Err(error) => return Err(error).context("request"),
            }
        }
    }

    async fn receive(&self, response: ResponseFuture, answer: &mut Answer) -> Result<(Bytes, HeaderMap)> {
        let response = response.await.context("response")?;
        let peer = peer(response.headers()).or(answer.peer);
        answer.peer = peer;
        if let Some(channel) = &mut *self.channel.lock().await
            && channel.answer.connecting == answer.connecting
        {
            channel.answer.peer = peer;
        }
        ensure!(response.status().is_success(), "{}", response.status());
        let headers = response.headers().clone();
        let mut body = response.into_body();
        let bytes = collect(&mut body).await.context("stream")?;
        Ok((bytes, body.trailers().await.context("trailers")?.unwrap_or(headers)))
    }

    async fn send(&self, text: &str, mut messages: SendStream<Bytes>) {
        for number in 1..=self.load.messages {
            if number > 1 {
                tokio::time::sleep(Duration::from_micros(self.load.pause)).await;
            }
            // Whether the stream broke is seen by its answer.
            if messages.send_data(Bytes::from(text.to_owned()), number == self.load.messages).is_err() {
                return;
            }
        }
    }

    async fn connection(&self, answer: &mut Answer) -> Result<SendRequest<Bytes>> {
        let mut channel = self.channel.lock().await;
        if let Some(known) = &*channel
            && let Ok(sender) = known.inner.clone().ready().await
        {
            *answer = known.answer;
            return Ok(sender);
        }
        let stream = connect(&self.load, answer).await?;
        let (sender, connection) = handshake(stream).await.context("handshake")?;
        tokio::spawn(connection);
        *channel = Some(Known { inner: sender.clone(), answer: *answer });
        sender.ready().await.context("connection")
    }
}

async fn collect(body: &mut RecvStream) -> Result<Bytes, h2::Error> {
    let mut bytes = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}
