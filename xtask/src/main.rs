//! `cargo xtask …`: every command that a contributor or CI needs, each a module of its own.
//!
//! The commands install what they need, can run twice in a row and say plainly what they cannot do.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod cluster;
mod crd;
mod demo;
mod ebpf;
mod image;
mod install;
mod process;
mod promtool;
mod test;

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the eBPF object that the resolver embeds
    BuildEbpf(ebpf::Args),
    /// Generate the `CustomResourceDefinition` in config/ from the Rust types
    Crd(crd::Args),
    /// Build the container images as OCI archives
    Image(image::Args),
    /// Show Elasti at work: a Service sleeps and wakes on a real Kubernetes
    Demo(demo::Args),
    /// Run all tests, or those of one level
    Test(test::Args),
    /// Measure the resolver beside what would be used instead
    Bench(bench::Args),
    /// Run a real two-node Kubernetes on this machine
    Cluster(cluster::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::BuildEbpf(args) => ebpf::run(&args),
        Command::Crd(args) => crd::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Cluster(args) => cluster::run(&args),
    }
}
