//! The place at a backend that a connection was dialled with, for the first request on it: given back, that request would queue
//! behind all who wait, and the connection would have been dialled in vain.
//!
//! A client keeps nobody out with it: [`super::io`] gives it back as soon as the client has to be waited for.

use std::sync::{Mutex, PoisonError};

use crate::balance::Place;

/// A place for whoever takes it first.
#[derive(Debug)]
pub struct Reservation(Mutex<Option<Place>>);

impl Reservation {
    /// Keeps `place` until it is taken.
    pub fn new(place: Option<Place>) -> Self {
        Self(Mutex::new(place))
    }

    /// The place, once; dropped, it is free.
    pub fn take(&self) -> Option<Place> {
        // Taking leaves nothing half done, so a poisoned lock still guards a sound value.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
