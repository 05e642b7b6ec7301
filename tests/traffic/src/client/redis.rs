//! Redis over a pool of connections that are kept: `ECHO`, as any client of it pipelines nothing.

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::TcpStream;

use super::call::{Answer, Known, Pool, connect, put, take};
use crate::record::Load;

type Connection = BufStream<TcpStream>;

#[derive(Clone)]
pub(super) struct Caller {
    load: Load,
    pool: Pool<Connection>,
}

impl Caller {
    pub(super) fn new(load: &Load) -> Self {
        Self { load: load.clone(), pool: Pool::default() }
    }

    pub(super) async fn call(&self, text: &str, answer: &mut Answer) -> Result<()> {
        let mut connection = self.connection(answer).await?;
        let echo = command(&mut connection, &["ECHO", text]).await?;
        ensure!(echo == text, "wrong answer: {echo:?}");
        if answer.peer.is_none() {
            let info = command(&mut connection, &["CLIENT", "INFO"]).await?;
            let address = info.split(' ').find_map(|field| field.strip_prefix("addr="));
            answer.peer = address.and_then(|address| Some(address.parse::<std::net::SocketAddr>().ok()?.ip()));
        }
        put(&self.pool, Known { inner: connection, answer: *answer });
        Ok(())
    }

    async fn connection(&self, answer: &mut Answer) -> Result<Connection> {
        while let Some(kept) = take(&self.pool) {
            if is_open(kept.inner.get_ref()) {
                *answer = kept.answer;
                return Ok(kept.inner);
            }
        }
        Ok(BufStream::new(connect(&self.load, answer).await?))
    }
}

/// Whether the other side has not closed an idle connection, as pools look before they lend one.
fn is_open(stream: &TcpStream) -> bool {
    matches!(stream.try_read(&mut [0; 1]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Sends a command and returns the bulk string that answers it.
async fn command(connection: &mut Connection, words: &[&str]) -> Result<String> {
    let words: Vec<String> = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len())).collect();
    let request = format!("*{}\r\n{}", words.len(), words.concat());
    connection.write_all(request.as_bytes()).await.context("send")?;
    connection.flush().await.context("send")?;
    let mut line = String::new();
    connection.read_line(&mut line).await.context("receive")?;
    let Some(length) = line.trim_end().strip_prefix('$') else { bail!("answer {line:?}") };
    let mut answer = vec![0; length.parse::<usize>()? + 2];
    connection.read_exact(&mut answer).await.context("receive")?;
    answer.truncate(answer.len() - 2);
    Ok(String::from_utf8(answer)?)
}
