//! The scripted operator, for both test programs.

pub(crate) use elasti_stand::operator::{Identity, Operator};
