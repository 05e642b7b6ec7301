//! What the eBPF programs cost a connection, as the kernel counts it (`BPF_ENABLE_STATS`): those that run for each `connect`, and
//! the one that follows connections to pods.
//!
//! The kernel's count holds its own reading of the clock. How much that is shows a program that does nothing, and it is taken off.
//! The programs are attached to a cgroup of their own, in which this process is meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use elasti_resolver::interception::{Entries, Redirect};
use elasti_resolver::redirect::Redirector;
use elasti_resolver::tracking::{Track, Wanted};

use super::Bench;
use floor::Floor;

use crate::process::cgroup2;
use crate::report::{Goal, Outcome, Row, Spread, Wanted as Goals};

mod floor;

/// Goals, in nanoseconds.
const UNRELATED_GOAL: f64 = 25.0;
const HIT_GOAL: f64 = 400.0;
const TRACKED_GOAL: f64 = 1000.0;
const UNTRACKED_GOAL: f64 = 50.0;

/// How much dearer a full map may be than one with one entry. Its lines are in no cache, those of the other are.
const FLAT: f64 = 1.5;

/// From one entry that is dialled to the next: a prime number far from their neighbours in memory, so that all are before one is again.
const STRIDE: u32 = 48_271;

/// As many as the map takes.
const FULL: u32 = resolver_ebpf::REDIRECTS_MAX;

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    let _runtime = bench.runtime.enter();
    let cgroup = Cgroup::enter()?;
    let _stats = enable_stats(Stats::RunTime).context("the kernel does not count run times")?;
    let before: Vec<u32> = programs().into_iter().map(|program| program.0).collect();
    let (mut redirector, sockets) = Redirector::load_following(&cgroup.directory, false, &["kubelet".to_owned()])?;
    let mut sockets = sockets.map_err(anyhow::Error::msg)?;
    let ours = Ours { before };
    let _floor = Floor::attach(&cgroup.directory)?;
    let batches = bench.rounds() * 3;
    let connects = if bench.short { 500 } else { 5000 };
    let mut outcome = Outcome::default();

    // Nobody listens at either, so that a connection is one packet and its answer.
    let (unrelated, replacement) = (loopback(9), loopback(10));
    let service = |index: u32| SocketAddr::from((Ipv4Addr::from(0x0a60_0001 + index), 80));
    let (mut hits, mut floors) = (Vec::new(), Vec::new());
    for (name, size) in [("1 entry", 1), ("a full map", FULL)] {
        let entries: Entries = (0..size).map(|index| (service(index), replacement)).collect();
        redirector.sync(&entries).map_err(anyhow::Error::msg)?;
        let mut entry = 0;
        for (case, goal, hit) in [("unrelated destination", UNRELATED_GOAL, false), ("hit", HIT_GOAL, true)] {
            let mut values = Vec::new();
            for _ in 0..batches {
                let (begun, floor_begun) = (ours.run("connect4")?, ours.run(floor::NAME)?);
                for _ in 0..connects {
                    entry = (entry + STRIDE) % size;
                    if TcpStream::connect(if hit { service(entry) } else { unrelated }).is_ok() {
                        bail!("somebody listens where nobody should");
                    }
                }
                let (ended, floor_ended) = (ours.run("connect4")?, ours.run(floor::NAME)?);
                if ended.1 - begun.1 < connects {
                    bail!("connect4 does not run for connections of this cgroup");
                }
                let floor = ratio(floor_ended.0 - floor_begun.0, floor_ended.1 - floor_begun.1);
                floors.push(floor);
                values.push(ratio(ended.0 - begun.0, ended.1 - begun.1) - floor);
            }
            let figure = format!("connect hook, {case}, {name} ({size})");
            if case == "hit" {
                hits.extend(Spread::of(&values).map(|spread| spread.median));
            }
            add(&mut outcome, figure, goal, values);
        }
    }
    if let [small, full] = hits[..] {
        let figure = format!("a hit among {FULL}, times one among one");
        outcome.goals.push(Goal { figure, unit: "", wanted: Goals::AtMost(FLAT), values: vec![full / small] });
    }
    redirector.sync(&Entries::new()).map_err(anyhow::Error::msg)?;
    let floor = Spread::of(&floors).context("nothing was measured")?.median;
    outcome.rows.push(Row {
        case: "a program that does nothing".into(),
        contender: "counting".into(),
        unit: "ns",
        values: floors,
    });

    for (case, goal, follow) in [("tracked", TRACKED_GOAL, true), ("untracked", UNTRACKED_GOAL, false)] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let wanted: BTreeMap<SocketAddr, Wanted> = follow.then(|| (address, Wanted::default())).into_iter().collect();
        sockets.sync(&wanted);
        let mut values = Vec::new();
        for _ in 0..batches {
            let begun = ours.run("follow")?;
            for _ in 0..connects {
                let client = TcpStream::connect(address)?;
                let (server, _) = listener.accept()?;
                // The client first: its side waits for no time then.
                drop(server);
                drop(client);
            }
            let ended = ours.run("follow")?;
            values.push(ratio(ended.0 - begun.0, connects) - floor * ratio(ended.1 - begun.1, connects));
        }
        if follow && sockets.look().map_err(anyhow::Error::msg)?.values().all(|seen| seen.opened < connects) {
            bail!("the connections were not followed");
        }
        add(&mut outcome, format!("following a connection, {case}, both ends"), goal, values);
    }
    outcome.notes.push(format!(
        "Nanoseconds by the kernel's own count, less what it counts for a program that does nothing; {connects} connections a batch. \
         The map takes {FULL} entries; each hit is of another one."
    ));
    Ok(outcome)
}

fn add(outcome: &mut Outcome, figure: String, goal: f64, values: Vec<f64>) {
    outcome.rows.push(Row { case: figure.clone(), contender: "elasti".into(), unit: "ns", values: values.clone() });
    outcome.goals.push(Goal { figure, unit: "ns", wanted: Goals::AtMost(goal), values });
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn ratio(nanoseconds: u64, times: u64) -> f64 {
    nanoseconds as f64 / times as f64
}

/// The programs that this process has loaded; resolvers of a cluster on this machine have some of the same names.
struct Ours {
    before: Vec<u32>,
}

impl Ours {
    /// For how many nanoseconds a program has run, and how often.
    fn run(&self, name: &str) -> Result<(u64, u64)> {
        let mut found = programs().into_iter().filter(|(id, known, ..)| known == name && !self.before.contains(id));
        match (found.next(), found.next()) {
            (Some((_, _, time, count)), None) => Ok((time, count)),
            (None, _) => bail!("there is no program {name}"),
            (Some(_), Some(_)) => bail!("somebody else has loaded a program {name} meanwhile"),
        }
    }
}

/// Id, name, nanoseconds and runs of each program.
fn programs() -> Vec<(u32, String, u64, u64)> {
    // One that goes meanwhile is none of ours.
    let programs = loaded_programs().filter_map(Result::ok).map(|program| {
        let time = u64::try_from(program.run_time().as_nanos()).unwrap_or(u64::MAX);
        (program.id(), program.name_as_str().unwrap_or_default().to_owned(), time, program.run_count())
    });
    programs.collect()
}

/// A cgroup that this process is in until it is dropped.
struct Cgroup {
    directory: PathBuf,
    home: PathBuf,
}

impl Cgroup {
    fn enter() -> Result<Self> {
        let root = cgroup2()?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("this process has no cgroup2")?;
        let it = Self { directory: root.join(format!("elasti-bench-{}", uid()?)), home: root.join(own) };
        fs::create_dir(&it.directory).with_context(|| format!("cannot make {}", it.directory.display()))?;
        join(&it.directory)?;
        Ok(it)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What is left is empty, and says whose it was.
        let _left = join(&self.home);
        let _gone = fs::remove_dir(&self.directory);
    }
}

/// Tells runs apart: process ids do not, in a namespace of their own.
fn uid() -> Result<u128> {
    Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_micros())
}

fn join(cgroup: &Path) -> Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"))?;
    // 0 is whoever writes it.
    Ok(file.write_all(b"0")?)
}
