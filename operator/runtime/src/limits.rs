//! Limits of the process that are raised at the start, as far as the system allows.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Every connection costs a descriptor, a forwarded one two: as many as the kernel allows this process. Container
/// runtimes set a soft limit as low as 1,024.
pub fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(?current, ?maximum, %error, "cannot raise the limit of open files");
    }
}
