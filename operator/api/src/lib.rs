//! What operator and resolver share, and all that they know about each other.
//!
//! Reading order: [`names`] (what objects, ports and flags are called), [`message`] (what travels on the resolver
//! stream), [`summary`] (what of it need not travel again), [`probe`] (requests that are answered in place of a target), [`readiness`]
//! (how starting pods are asked), and, with the feature `crd`, [`v1alpha1`] (the ElastiService resource).

pub mod cidr;
pub mod message;
pub mod names;
pub mod probe;
pub mod readiness;
pub mod summary;
#[cfg(feature = "crd")]
pub mod v1alpha1;
