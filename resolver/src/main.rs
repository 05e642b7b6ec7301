//! The resolver's program: flags, logs, signals; the rest is the library.

use std::process::ExitCode;

use elasti_resolver::app::{self, Redirection};
use elasti_resolver::config::{Arguments, Config};
use elasti_resolver::redirect::{self, Redirector};
use elasti_resolver::tracking::Track;
use elasti_runtime::telemetry::Levels;
use elasti_runtime::{config, limits, shutdown, telemetry};

fn main() -> ExitCode {
    let arguments: Arguments = match config::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let config = match Config::new(&arguments) {
        Ok(config) => config,
        Err(faults) => {
            eprintln!("{faults}");
            return ExitCode::from(config::EX_USAGE);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(config: Config) -> anyhow::Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let _reporting = config.reporting.as_ref().map(|reporting| reporting.begin(env!("CARGO_PKG_NAME"), version));
    let levels: Levels = telemetry::init(config.log_format, &config.log_level)?;
    tracing::info!(?config, version, "configuration");
    limits::raise_open_files();
    let shutdown = shutdown::on_signal()?;
    let redirection = redirection(&config);
    if let Redirection::Off(reason) = &redirection {
        tracing::warn!(reason, "connections are not redirected on this node; EndpointSlices bring them");
    }
    let bound = app::build(config, redirection, levels).await?;
    tracing::info!(admin = %bound.admin, "running");
    bound.run(shutdown).await;
    tracing::info!("ended");
    Ok(())
}

fn redirection(config: &Config) -> Redirection {
    if !config.ebpf {
        return Redirection::Off("switched off by --ebpf".to_owned());
    }
    let log = tracing::enabled!(tracing::Level::DEBUG);
    let loaded = redirect::cgroup::find(&config.cgroup)
        .map_err(redirect::LoadError::from)
        .and_then(|cgroup| Redirector::load_following(&cgroup, log, &config.probers));
    match loaded {
        Ok((redirector, sockets)) => {
            if let Err(reason) = &sockets {
                tracing::warn!(
                    reason,
                    "connections to pods are not followed on this node; the trigger traffic says so"
                );
            }
            let track = sockets.map(|sockets| Box::new(sockets) as Box<dyn Track>);
            Redirection::On { redirect: Box::new(redirector), mark: redirect::mark, track }
        }
        Err(error) => Redirection::Off(error.to_string()),
    }
}
