//! A target that speaks several protocols, clients that call it open-loop, and what they record of every request.
//!
//! Both run as the one program `elasti-traffic`: the target in pods, the clients in pods and on hosts of the test cluster.
//! `tests/src/cycles` gives clients their [`record::Command`]s and judges their [`record::Record`]s; nothing is judged
//! here.

pub mod client;
pub mod record;
pub mod target;
