//! A host of its own for one test: a network namespace without an uplink and a cgroup, removed when dropped.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// The address of the host that stands for a resolver's pod, in both families.
pub const RESOLVER: [&str; 2] = ["10.200.0.1", "fd00:200::1"];

/// A namespace and a cgroup.
#[derive(Debug)]
pub struct Host {
    name: String,
    cgroup: PathBuf,
    children: Vec<Child>,
}

impl Host {
    /// Makes a host named after the test. Panics without root or cgroup2: these tests are never skipped.
    pub fn new(test: &str) -> Self {
        let name = format!("elasti-{}-{test}", std::process::id());
        let cgroup = cgroup2().join(&name);
        let host = Self { cgroup, children: vec![], name };
        run(Command::new("ip").args(["netns", "add", &host.name]));
        run(host.inside("ip").args(["link", "set", "lo", "up"]));
        for address in RESOLVER {
            run(host.inside("ip").args(["address", "add", address, "dev", "lo"]));
        }
        std::fs::create_dir(&host.cgroup).expect("cannot make a cgroup; run as root");
        host
    }

    /// The directory of its cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Makes a cgroup below its own.
    pub fn make_cgroup(&self, below: &str) {
        std::fs::create_dir_all(self.cgroup.join(below)).expect("cannot make a cgroup");
    }

    /// A command in its network namespace and cgroup.
    pub fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.below("", program)
    }

    /// A command in its network namespace and a cgroup below its own.
    fn below(&self, cgroup: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .args(["sh", "-c", r#"[ ! -d "$0" ] || echo $$ > "$0/cgroup.procs"; exec "$@""#])
            .arg(self.cgroup.join(cgroup))
            .arg(program);
        command
    }

    /// Starts a server that greets every connection with its own name; returns its port on [`RESOLVER`]'s addresses.
    pub fn serve(&mut self, name: &str) -> u16 {
        self.start("", &["serve", name])
    }

    /// The same on this port.
    pub fn serve_at(&mut self, name: &str, port: u16) {
        self.start("", &["serve", name, &port.to_string()]);
    }

    /// Starts a server in a cgroup below the host's own that takes whatever it gets and never says anything.
    pub fn keep(&mut self, cgroup: &str) -> u16 {
        self.start(cgroup, &["keep"])
    }

    fn start(&mut self, cgroup: &str, arguments: &[&str]) -> u16 {
        let mut child =
            self.below(cgroup, probe()).args(arguments).stdout(Stdio::piped()).spawn().expect("cannot start a server");
        let mut port = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut port).expect("a server's port");
        self.children.push(child);
        port.trim().parse().expect("a server's port")
    }

    /// Connects as a client and returns what it prints: the peer that it sees and the greeting, or the error.
    pub fn connect(&self, arguments: &[&str]) -> String {
        self.connect_from("", arguments)
    }

    /// The same as a client in a cgroup below the host's own.
    pub fn connect_from(&self, cgroup: &str, arguments: &[&str]) -> String {
        let output =
            self.below(cgroup, probe()).arg("connect").args(arguments).output().expect("cannot start a client");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Sets a parameter of its network.
    pub fn set(&self, parameter: &str, value: &str) {
        run(self.inside("sysctl").arg("-w").arg(format!("{parameter}={value}")));
    }

    /// Has the resolver's dialer open this many connections, one after the other, each of which it is the first to close; returns
    /// how many it opened, or the error.
    pub fn dial(&self, address: SocketAddr, count: u32) -> String {
        let output = self.inside(probe()).arg("dial").arg(address.to_string()).arg(count.to_string()).output();
        String::from_utf8_lossy(&output.expect("cannot start a client").stdout).trim().to_owned()
    }

    /// Connects to both addresses, the second time with a socket whose note displaces that of the first; returns the peers that
    /// both sockets name after that.
    pub fn displace(&self, first: &str, second: &str) -> String {
        let output = self.inside(probe()).args(["displace", first, second]).output().expect("cannot start a client");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Opens a connection that stays open until it is dropped.
    pub fn talk(&self, address: SocketAddr) -> Talk {
        open(self.inside(probe()), address)
    }

    /// The same as a process of this name in a cgroup below the host's own.
    pub fn talk_as(&self, name: &str, cgroup: &str, address: SocketAddr) -> Talk {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join(name);
        std::os::unix::fs::symlink(probe(), &program).expect("a link");
        open(self.below(cgroup, program), address)
    }
}

fn open(mut program: Command, address: SocketAddr) -> Talk {
    program.arg("talk").arg(address.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = program.spawn().expect("cannot start a client");
    let said = BufReader::new(child.stdout.take().expect("piped"));
    let mut talk = Talk { child, said };
    talk.expect("connected");
    talk
}

/// An open connection of a client.
#[derive(Debug)]
pub struct Talk {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Talk {
    /// Sends one byte.
    pub fn say(&mut self) {
        let input = self.child.stdin.as_mut().expect("piped");
        input.write_all(b"x\n").and_then(|()| input.flush()).expect("the client runs");
        self.expect("sent");
    }

    fn expect(&mut self, word: &str) {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("a word of the client");
        assert_eq!(line.trim(), word);
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _gone = child.kill();
            let _reaped = child.wait();
        }
        let _gone = Command::new("ip").args(["netns", "delete", &self.name]).status();
        remove(&self.cgroup);
    }
}

/// Removes a cgroup and those below it, which must go first.
fn remove(cgroup: &Path) {
    for below in std::fs::read_dir(cgroup).into_iter().flatten().filter_map(Result::ok) {
        if below.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&below.path());
        }
    }
    let _gone = std::fs::remove_dir(cgroup);
}

/// The machine's cgroup2 hierarchy.
pub(crate) fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("/proc is readable");
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    mount.split(' ').nth(1).expect("a mount has a point").into()
}

fn run(command: &mut Command) {
    let output = command.output().expect("cannot start");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The client and server program, built beside the tests.
fn probe() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let directory = test.parent().and_then(Path::parent).expect("target/debug/deps");
    directory.join("probe")
}
