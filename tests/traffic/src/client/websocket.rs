//! A WebSocket for each request; each of its messages must be echoed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;

use super::call::{Answer, connect};
use crate::record::Load;
use crate::target::PEER;

pub(super) async fn call(load: &Load, text: &str, answer: &mut Answer) -> Result<()> {
    let stream = connect(load, answer).await?;
    let (mut socket, response) = client_async("ws://target/socket", stream).await.context("handshake")?;
    let peer = response.headers().get(PEER).and_then(|peer| peer.to_str().ok()?.parse().ok());
    answer.peer = peer;
    for number in 0..load.messages {
        if number > 0 {
            tokio::time::sleep(Duration::from_micros(load.pause)).await;
        }
        socket.send(Message::text(text)).await.context("send")?;
        let echo = socket.next().await.context("closed")?.context("receive")?;
        ensure!(echo == Message::text(text), "wrong answer: {echo:?}");
    }
    // All answers are there; how the goodbye goes is nobody's loss.
    let _said = socket.close(None).await;
    Ok(())
}
