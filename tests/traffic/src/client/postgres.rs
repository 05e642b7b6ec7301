//! PostgreSQL over a pool of connections that are kept.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use tokio_postgres::{Client, Config, NoTls};

use super::call::{Answer, Known, Pool, connect, put, take};
use crate::record::Load;

/// What the server is asked: to say again what it is told, and who it sees.
const QUERY: &str = "SELECT $1::text, host(inet_client_addr())";

#[derive(Clone)]
pub(super) struct Caller {
    load: Load,
    pool: Pool<Client>,
}

impl Caller {
    pub(super) fn new(load: &Load) -> Self {
        Self { load: load.clone(), pool: Pool::default() }
    }

    pub(super) async fn call(&self, text: &str, answer: &mut Answer) -> Result<()> {
        let client = self.connection(answer).await?;
        let row = client.query_one(QUERY, &[&text]).await.context("query")?;
        let (echo, peer): (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
        ensure!(echo == text, "wrong answer: {echo:?}");
        answer.peer = Some(peer.parse::<IpAddr>()?);
        put(&self.pool, Known { inner: client, answer: *answer });
        Ok(())
    }

    async fn connection(&self, answer: &mut Answer) -> Result<Client> {
        while let Some(kept) = take(&self.pool) {
            if !kept.inner.is_closed() {
                *answer = kept.answer;
                return Ok(kept.inner);
            }
        }
        let stream = connect(&self.load, answer).await?;
        let (client, connection) =
            Config::new().user("postgres").dbname("postgres").connect_raw(stream, NoTls).await.context("session")?;
        tokio::spawn(connection);
        Ok(client)
    }
}
