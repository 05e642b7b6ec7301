//! The operator's program: flags, logs, signals; the rest is the library.

use std::process::ExitCode;

use elasti_operator::app;
use elasti_operator::clients::Clients;
use elasti_operator::config::{Arguments, Config};
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
    let bound = app::build(config, Clients::infer().await?, levels).await?;
    tracing::info!(notify = %bound.notify, health = %bound.health, stream = %bound.stream, "running");
    bound.run(shutdown).await;
    tracing::info!("ended");
    Ok(())
}
