//! The body of a response: the target's, passed on as it comes, trailers included; or one of our own. It holds whatever
//! must last until its end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};

use super::inbox::Inbox;
use crate::balance::Place;
use crate::service::Forwarding;

/// A response's body.
#[derive(Debug, Default)]
pub struct Body {
    source: Source,
    during: Option<During>,
}

#[derive(Debug, Default)]
enum Source {
    #[default]
    Empty,
    Own(Bytes),
    Target(Incoming),
}

/// What lasts as long as the response does.
#[derive(Debug, Default)]
pub struct During {
    /// Counts the request at the backend, and as forwarded.
    pub forwarding: Option<(Place, Forwarding)>,
    /// Says when the response is complete.
    pub answering: Option<Answering>,
}

/// A request that is being answered; the answer is complete when this is dropped.
#[derive(Debug)]
pub struct Answering(Arc<Inbox>);

impl Answering {
    /// hyper asks for the answer to the request that `inbox` has.
    pub fn new(inbox: &Arc<Inbox>) -> Self {
        inbox.answering();
        Self(Arc::clone(inbox))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answered();
    }
}

impl Body {
    /// The target's.
    pub fn of(target: Incoming) -> Self {
        Self { source: Source::Target(target), during: None }
    }

    /// Keeps `during` until the end.
    #[must_use]
    pub fn during(self, during: During) -> Self {
        Self { during: Some(during), ..self }
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Self { source: Source::Own(text.into()), during: None }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = match &mut self.source {
            Source::Target(target) => std::task::ready!(Pin::new(target).poll_frame(cx)),
            Source::Own(text) => {
                let text = std::mem::take(text);
                self.source = Source::Empty;
                Some(Ok(Frame::data(text)))
            }
            Source::Empty => None,
        };
        if frame.is_none() {
            self.during = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Target(target) => target.is_end_stream(),
            Source::Own(_) => false,
            Source::Empty => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Target(target) => target.size_hint(),
            Source::Own(text) => SizeHint::with_exact(text.len() as u64),
            Source::Empty => SizeHint::with_exact(0),
        }
    }
}
