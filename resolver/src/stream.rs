//! The streams to the operators: one to every replica that the operators' name resolves to.
//!
//! Addresses are looked up again and again; when that fails the last ones stay. A replica whose address is no longer
//! named keeps its stream as long as it lasts.

pub mod connection;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use connection::Connector;

/// How soon a new replica is found.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(5);

/// A replica that restarts is back within seconds, and a held connection may depend on it.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// A thousand resolvers that try every five seconds are 200 handshakes a second.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Keeps a stream to every replica until `ended`.
pub async fn run(connector: Connector, ended: CancellationToken) {
    let mut tasks = JoinSet::new();
    let mut replicas: HashMap<SocketAddr, watch::Sender<bool>> = HashMap::new();
    let mut failing = false;
    loop {
        match tokio::net::lookup_host((connector.host(), connector.port())).await {
            Ok(found) => {
                failing = false;
                let found: Vec<SocketAddr> = found.collect();
                replicas.retain(|address, named| {
                    named.send_replace(found.contains(address));
                    !named.is_closed()
                });
                for address in found {
                    replicas.entry(address).or_insert_with(|| {
                        let (named, watched) = watch::channel(true);
                        tasks.spawn(keep(connector.clone(), address, watched));
                        named
                    });
                }
            }
            Err(error) if !std::mem::replace(&mut failing, true) => {
                tracing::warn!(host = connector.host(), %error, "cannot look the operators up; keeping the last addresses");
            }
            Err(_) => {}
        }
        while tasks.try_join_next().is_some() {}
        if ended.run_until_cancelled(tokio::time::sleep(LOOKUP_INTERVAL)).await.is_none() {
            return;
        }
    }
}

/// Keeps a stream to one address as long as it is named.
async fn keep(connector: Connector, address: SocketAddr, mut named: watch::Receiver<bool>) {
    let mut pause = PAUSE_MIN;
    let mut told = None;
    while *named.borrow_and_update() {
        let (synced, error) = connector.connect(address).await;
        let error = error.to_string();
        // A replica that stays away is told of once.
        if synced || told.as_ref() != Some(&error) {
            tracing::warn!(%address, error, "no stream to this operator replica; trying again");
        }
        told = Some(error);
        pause = if synced { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
        let jittered = pause.mul_f64(fastrand::f64().mul_add(0.5, 0.5));
        tokio::select! {
            () = tokio::time::sleep(jittered) => {}
            gone = named.wait_for(|named| !*named) => if gone.is_err() { return },
        }
    }
}
