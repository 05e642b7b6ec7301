//! The GOAWAY that asks a client of HTTP/2 to open no more streams, put between the frames that hyper writes.
//!
//! hyper's own way to end a connection sends this frame too, and a PING behind it; as soon as that is answered it refuses
//! the streams that it has not seen. A client may answer a PING before it sends the streams that it has opened already, as
//! h2 does, and those would be lost to whoever does not repeat them. So the client is told first, and given time, before
//! hyper ends the connection (RFC 9113, section 6.8). [`crate::http::io`] asks where the frame may stand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Length, type 7, no flags, connection; the last stream that will be answered is any, and there is no error.
const FRAME: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// Length of a frame's header; its first three bytes are the length of what follows it.
const HEADER: usize = 9;

/// Asks for the frame, from outside of the connection. Whoever does polls the connection next.
#[derive(Clone, Debug, Default)]
pub struct Ask(Arc<AtomicBool>);

impl Ask {
    /// Asks for it.
    pub fn send(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What has been written of a connection's frames, and whether the GOAWAY is due.
#[derive(Debug)]
pub struct GoAway {
    asked: Ask,
    /// Of our own frame, once it is begun.
    sent: usize,
    header: [u8; HEADER],
    /// Of the header, if less than all of a frame is written.
    header_written: usize,
    /// Of what follows the header.
    left: usize,
    /// The first frame must be SETTINGS.
    begun: bool,
}

impl GoAway {
    /// Follows a connection that nothing was written to.
    pub fn new(asked: Ask) -> Self {
        Self { asked, sent: 0, header: [0; HEADER], header_written: 0, left: 0, begun: false }
    }

    /// What must be written before anything else; empty when that is nothing.
    pub fn due(&self) -> &'static [u8] {
        let between = self.begun && self.header_written == 0 && self.left == 0;
        if between && self.asked.0.load(Ordering::Relaxed) { &FRAME[self.sent..] } else { &[] }
    }

    /// So many bytes of [`GoAway::due`] were written.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
    }

    /// These bytes of other frames were written.
    pub fn wrote(&mut self, mut bytes: &[u8]) {
        self.begun |= !bytes.is_empty();
        while !bytes.is_empty() {
            if self.left > 0 {
                let payload = self.left.min(bytes.len());
                self.left -= payload;
                bytes = &bytes[payload..];
                continue;
            }
            self.header[self.header_written] = bytes[0];
            self.header_written += 1;
            bytes = &bytes[1..];
            if self.header_written == HEADER {
                self.header_written = 0;
                let [high, middle, low, ..] = self.header.map(usize::from);
                self.left = high << 16 | middle << 8 | low;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with so long a payload.
    fn frame(length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, 0, 0, 0, 0, 0, 1];
        frame.resize(HEADER + usize::from(length), 0xff);
        frame
    }

    #[test]
    fn it_stands_between_frames_only_however_they_are_cut() {
        let frames = [frame(0), frame(5), frame(200)];
        let bytes = frames.concat();
        let ends: Vec<usize> = frames
            .iter()
            .scan(0, |end, frame| {
                *end += frame.len();
                Some(*end)
            })
            .collect();
        for first in 0..=bytes.len() {
            let ask = Ask::default();
            let mut goaway = GoAway::new(ask.clone());
            ask.send();
            goaway.wrote(&bytes[..first]);
            assert_eq!(!goaway.due().is_empty(), ends.contains(&first), "after {first} bytes");
            goaway.wrote(&bytes[first..]);
            assert_eq!(goaway.due(), FRAME);
        }
    }

    #[test]
    fn it_is_sent_once_and_only_when_it_is_asked_for() {
        let ask = Ask::default();
        let mut goaway = GoAway::new(ask.clone());
        goaway.wrote(&frame(3));
        assert!(goaway.due().is_empty());
        ask.send();
        goaway.sent(10);
        assert_eq!(goaway.due(), &FRAME[10..]);
        goaway.sent(7);
        assert!(goaway.due().is_empty());
        goaway.wrote(&frame(3));
        assert!(goaway.due().is_empty());
    }
}
