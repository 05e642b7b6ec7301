//! Flags and environment: clap reads them as text, the programs turn them into typed values and collect every fault in
//! [`Faults`], so that whoever starts a program learns of all of them at once.

use std::ffi::OsString;
use std::fmt::{self, Display};
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Arg, Command, CommandFactory, FromArgMatches};

/// Exit code for a faulty command line, `EX_USAGE` of `sysexits.h`.
pub const EX_USAGE: u8 = 64;

/// The flags of the program, each with its environment variable: `--some-flag` is `ELASTI_SOME_FLAG` unless the flag
/// names another one.
pub fn command<A: CommandFactory>() -> Command {
    A::command().mut_args(|argument: Arg| {
        let Some(flag) = argument.get_long().filter(|_| argument.get_env().is_none()) else { return argument };
        let variable = format!("ELASTI_{}", flag.to_uppercase().replace('-', "_"));
        argument.env(variable)
    })
}

/// Reads flags of the program; what is not on the command line comes from the environment. Fields of `A` should be
/// `String`s, for then clap itself finds no fault in a value.
///
/// Help, the version and unknown flags have been printed when this fails; end the process with the code it returns.
pub fn parse<A: CommandFactory + FromArgMatches>(arguments: impl IntoIterator<Item = OsString>) -> Result<A, ExitCode> {
    let matches = command::<A>().try_get_matches_from(arguments);
    matches.and_then(|matches| A::from_arg_matches(&matches)).map_err(|error| {
        // Nobody is left to tell when even stderr is gone.
        drop(error.print());
        if error.use_stderr() { ExitCode::from(EX_USAGE) } else { ExitCode::SUCCESS }
    })
}

/// Every fault of a configuration.
#[derive(Debug, Default, PartialEq, Eq, thiserror::Error)]
pub struct Faults(Vec<String>);

impl Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration is faulty:")?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl Faults {
    /// Notes that `flag` is faulty; `cause` says why and what would be right.
    pub fn add(&mut self, flag: &str, cause: impl Display) {
        self.0.push(format!("{flag}: {cause}"));
    }

    /// The value of `flag`, or `None` and a fault. The caller goes on with any stand-in: [`Self::finish`] will fail.
    pub fn parse<T: FromStr<Err: Display>>(&mut self, flag: &str, value: &str) -> Option<T> {
        let value = value.trim();
        value.parse().map_err(|error| self.add(flag, format_args!("'{value}': {error}"))).ok()
    }

    /// The comma-separated values of `flag`; a fault for each that is not one. Empty items are left out.
    pub fn parse_list<T: FromStr<Err: Display>>(&mut self, flag: &str, values: &str) -> Vec<T> {
        values.split(',').filter(|value| !value.trim().is_empty()).filter_map(|value| self.parse(flag, value)).collect()
    }

    /// The value of a flag that must not be empty.
    pub fn required(&mut self, flag: &str, value: &str) -> String {
        if value.trim().is_empty() {
            self.add(flag, "is required");
        }
        value.trim().to_owned()
    }

    /// `config`, if there was no fault.
    pub fn finish<C>(self, config: C) -> Result<C, Self> {
        if self.0.is_empty() { Ok(config) } else { Err(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Arguments {
        #[arg(long, default_value = "1")]
        port_of_test: String,
    }

    fn read(arguments: &[&str]) -> Result<Arguments, ExitCode> {
        parse(["program"].iter().chain(arguments).map(OsString::from))
    }

    #[test]
    fn flags_are_read_and_unknown_ones_exit_with_64() {
        assert_eq!(read(&[]).unwrap().port_of_test, "1");
        assert_eq!(read(&["--port-of-test=2"]).unwrap().port_of_test, "2");
        assert_eq!(read(&["--port"]).err(), Some(ExitCode::from(EX_USAGE)));
        assert_eq!(read(&["--help"]).err(), Some(ExitCode::SUCCESS));
    }

    #[test]
    fn every_fault_is_told_at_once() {
        let mut faults = Faults::default();
        assert_eq!(faults.parse::<u16>("--port", "70000"), None);
        assert_eq!(faults.parse_list::<u16>("--ports", "1, x,,3"), [1, 3]);
        faults.required("--name", " ");
        let told = faults.finish(()).unwrap_err().to_string();
        assert_eq!(told.lines().count(), 4, "{told}");
        for flag in ["--port:", "--ports: 'x'", "--name: is required"] {
            assert!(told.contains(flag), "{told}");
        }
    }

    #[test]
    fn no_fault_gives_the_configuration() {
        let mut faults = Faults::default();
        let port = faults.parse::<u16>("--port", " 80 ");
        assert_eq!(faults.finish(port), Ok(Some(80)));
    }
}
