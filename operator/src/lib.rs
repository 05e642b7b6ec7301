//! The operator: reconciles ElastiServices.
//!
//! Reading order: [`observed`] (what is known of one ElastiService), [`plan`] (what is decided from it), then what
//! surrounds the decision: [`caches`], [`controller`] and [`work`].

pub mod app;
pub mod autoscaler;
pub mod caches;
pub mod certificates;
pub mod clients;
pub mod conditions;
pub mod config;
pub mod controller;
pub mod elastiserver;
pub mod idleness;
pub mod leader;
pub mod metrics;
pub mod observed;
pub mod partners;
pub mod permissions;
pub mod plan;
pub mod pods;
pub mod ports;
pub mod private_service;
pub mod probes;
pub mod protocol;
pub mod publication;
pub mod resolvers;
pub mod schedule;
pub mod scope;
pub mod slices;
pub mod sources;
pub mod target;
#[cfg(test)]
mod testing;
pub mod work;
