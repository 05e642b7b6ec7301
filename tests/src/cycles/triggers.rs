//! A stand-in for Prometheus that says of each Service whether it is idle, as the run wants it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The stand-in; it ends with the runtime.
#[derive(Clone)]
pub struct Triggers {
    address: SocketAddr,
    idle: Arc<Mutex<BTreeSet<String>>>,
}

impl Triggers {
    /// Starts it at an address of the node.
    pub async fn start(node: IpAddr) -> Self {
        let listener = TcpListener::bind((node, 0)).await.expect("the node's address is ours");
        let address = listener.local_addr().expect("bound");
        let idle = Arc::<Mutex<BTreeSet<String>>>::default();
        let shared = idle.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, shared.clone()));
            }
        });
        Self { address, idle }
    }

    /// Calls a Service idle, or says nothing of it: then it is neither put to sleep nor woken by its trigger.
    pub fn set_idle(&self, service: &str, idle: bool) {
        let mut services = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle {
            services.insert(service.to_owned());
        } else {
            services.remove(service);
        }
    }

    /// The trigger of a Service.
    pub fn of(&self, service: &str) -> Value {
        let address = format!("http://{}", self.address);
        let query = format!("requests_of_{service}_");
        json!({"type": "prometheus", "metadata": {"serverAddress": address, "query": query, "threshold": "0.5"}})
    }
}

async fn answer(mut stream: TcpStream, idle: Arc<Mutex<BTreeSet<String>>>) -> std::io::Result<()> {
    let mut request = vec![0; 4096];
    let length = stream.read(&mut request).await?;
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    // The server's own uptime is asked too, and is good.
    let value = if request.contains("min_over_time") {
        "1"
    } else {
        let services = idle.lock().unwrap_or_else(PoisonError::into_inner);
        if !services.iter().any(|service| request.contains(&format!("requests_of_{service}_"))) {
            return Ok(());
        }
        "0"
    };
    let answer = json!({
        "status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "value": [0, value]}]},
    });
    let answer = answer.to_string();
    let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", answer.len());
    stream.write_all((head + &answer).as_bytes()).await
}
