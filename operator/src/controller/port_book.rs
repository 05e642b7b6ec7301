//! The Lease holder's book of interception ports.
//!
//! A new holder reads every status uncached before it allocates: its caches may lag behind what its predecessor wrote.

use std::collections::HashSet;
use std::time::Instant;

use anyhow::Context as _;
use elasti_api::v1alpha1::{ElastiService, InterceptedPort};
use kube::api::ListParams;
use kube::core::DeserializeGuard;
use kube::{Api, Client};
use tokio::sync::Mutex;

use crate::ports::Ports;
use crate::scope::Scope;

pub(super) struct PortBook {
    apis: Vec<Api<DeserializeGuard<ElastiService>>>,
    book: Mutex<Book>,
    released: std::sync::Mutex<Vec<(String, Instant)>>,
}

#[derive(Default)]
struct Book {
    /// The epoch of the Lease for which the statuses have been read.
    read_in: Option<u64>,
    ports: Ports,
}

impl PortBook {
    pub(super) fn new(client: &Client, scope: &Scope) -> Self {
        Self { apis: scope.apis(client), book: Mutex::default(), released: std::sync::Mutex::default() }
    }

    /// Lets all ports of an ElastiService that is gone rest. For the Lease holder: a new one reads who is there.
    pub(super) fn release(&self, uid: &str) {
        self.released.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((uid.to_owned(), Instant::now()));
    }

    /// The ports that `elasti` shall have for `wanted` Service ports: those it has, and new ones for the rest.
    pub(super) async fn allocate(
        &self,
        epoch: u64,
        elasti: &ElastiService,
        owned: &[InterceptedPort],
        wanted: &[u16],
    ) -> anyhow::Result<Vec<InterceptedPort>> {
        let uid = elasti.metadata.uid.as_deref().unwrap_or_default();
        let mut book = self.book.lock().await;
        if book.read_in != Some(epoch) {
            let mut uids = HashSet::new();
            for api in &self.apis {
                let all = api.list(&ListParams::default()).await.with_context(|| {
                    let whose = api.namespace().map_or_else(String::new, |namespace| format!(" of namespace {namespace}"));
                    format!("no interception ports are given out while ElastiServices{whose} that may have them cannot be read")
                })?;
                for guard in all.items {
                    let metadata = match &guard.0 {
                        Ok(it) => &it.metadata,
                        Err(it) => &it.metadata,
                    };
                    let uid = metadata.uid.clone().unwrap_or_default();
                    for port in guard.0.ok().and_then(|other| other.status).unwrap_or_default().ports {
                        book.ports.claim(port.interception_port, &uid, port.port);
                    }
                    uids.insert(uid);
                }
            }
            book.ports.release_others(&uids, Instant::now());
            book.read_in = Some(epoch);
        }
        let released = std::mem::take(&mut *self.released.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for (gone, at) in released {
            book.ports.release(&gone, &[], at);
        }
        let now = Instant::now();
        let mut ports = Vec::with_capacity(wanted.len());
        for port in wanted {
            let interception_port = match owned.iter().find(|own| own.port == *port) {
                Some(own) => own.interception_port,
                None => book.ports.allocate(uid, *port, now)?,
            };
            ports.push(InterceptedPort { port: *port, interception_port });
        }
        let kept: Vec<u16> = ports.iter().map(|port| port.interception_port).collect();
        book.ports.release(uid, &kept, now);
        Ok(ports)
    }
}
