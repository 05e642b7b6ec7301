//! A stand-in for Prometheus that answers what a test tells it to.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// What it says to a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// 0 requests a second.
    Idle,
    /// 5 requests a second.
    Busy,
    /// Nothing: it closes the connection.
    Nothing,
}

/// The stand-in; it ends with the test's runtime.
pub struct Prometheus {
    address: SocketAddr,
    state: Arc<Mutex<(Says, u64)>>,
}

impl Prometheus {
    /// Starts it.
    pub async fn new(says: Says) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, state) = (listener.local_addr().unwrap(), Arc::new(Mutex::new((says, 0))));
        let shared = state.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let says = {
                    let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    state.1 += 1;
                    state.0
                };
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap_or(0);
                if says == Says::Nothing {
                    continue;
                }
                // The server's own uptime is asked too, and is good.
                let up = String::from_utf8_lossy(&request[..length]).contains("min_over_time");
                let value = if up {
                    "1"
                } else if says == Says::Idle {
                    "0"
                } else {
                    "5"
                };
                let answer = json!({
                    "status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "value": [0, value]}]},
                });
                let answer = answer.to_string();
                let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", answer.len());
                let _sent = stream.write_all((head + &answer).as_bytes()).await;
            }
        });
        Self { address, state }
    }

    /// Answers differently from now on.
    pub fn say(&self, says: Says) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = says;
    }

    /// How many connections it has taken.
    pub fn asked(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// A trigger that asks it.
    pub fn trigger(&self) -> Value {
        let address = format!("http://{}", self.address);
        json!({"type": "prometheus", "metadata": {"serverAddress": address, "query": "requests", "threshold": "0.5"}})
    }
}
