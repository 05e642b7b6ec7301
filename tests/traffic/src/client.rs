//! The clients: open-loop loads, told by lines on standard input, recorded as lines on standard output.
//!
//! A request arrives when its time has come, whatever has become of those before it; nothing is ever sent twice. Who reads
//! the records judges them.

use std::collections::HashMap;
use std::io::{BufRead, Write, stdin, stdout};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::record::{Command, Load, Record, Said, now};
use call::{Answer, Caller};

mod call;
mod grpc;
mod http1;
mod postgres;
mod redis;
mod websocket;

/// A request without its answer after this long has none.
const PATIENCE: Duration = Duration::from_mins(1);

/// Takes commands until standard input ends.
pub async fn run() -> anyhow::Result<()> {
    let (out, said) = unbounded_channel();
    let (commands, mut told) = unbounded_channel();
    // Threads, since neither end of a pipe can be asked whether it is ready without changing it for others.
    std::thread::spawn(|| write(said));
    std::thread::spawn(move || read(&commands));
    let mut loads = HashMap::new();
    out.send(Said::Ready)?;
    while let Some(command) = told.recv().await {
        match command {
            Command::Start(load) => {
                let stop = CancellationToken::new();
                loads.insert(load.load, stop.clone());
                tokio::spawn(run_load(load, stop, out.clone()));
            }
            Command::Stop { load } => {
                if let Some(stop) = loads.remove(&load) {
                    stop.cancel();
                }
            }
        }
    }
    Ok(())
}

fn read(commands: &UnboundedSender<Command>) -> anyhow::Result<()> {
    for line in stdin().lock().lines() {
        commands.send(serde_json::from_str(&line?)?)?;
    }
    Ok(())
}

fn write(mut said: UnboundedReceiver<Said>) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    while let Some(said) = said.blocking_recv() {
        out.write_all((serde_json::to_string(&said)? + "\n").as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

async fn run_load(load: Load, stop: CancellationToken, out: UnboundedSender<Said>) {
    let caller = Caller::new(&load);
    let mut requests = JoinSet::new();
    let begun = Instant::now();
    for number in 0..load.most {
        let late = if number == 0 { 0 } else { load.phase };
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = tokio::time::sleep_until(begun + Duration::from_micros(number * load.interval + late)) => {}
        }
        requests.spawn(request(load.clone(), number, caller.clone(), out.clone()));
        while requests.try_join_next().is_some() {}
    }
    requests.join_all().await;
    drop(caller);
    let _nobody_reads = out.send(Said::Done { load: load.load });
}

async fn request(load: Load, number: u64, client: Caller, out: UnboundedSender<Said>) {
    let arrived = now();
    let mut answer = Answer { connecting: arrived, peer: None };
    let text = format!("{}-{number}", load.load);
    let called = tokio::time::timeout(PATIENCE, client.call(&text, &mut answer)).await;
    let error = match called {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(_) => Some(format!("no answer after {} s", PATIENCE.as_secs())),
    };
    let Answer { connecting, peer } = answer;
    let record = Record { load: load.load, kind: load.kind, arrived, connecting, peer, ended: now(), error };
    let _nobody_reads = out.send(Said::Request(record));
}
