//! Where a chunked body ends (RFC 9112, section 7.1): followed beside hyper, which does not say. Pure; [`super::inbox`] feeds it
//! whatever comes after a head, since the head itself is known only later.
//!
//! Unsure counts as no end. What hyper refuses may be taken for anything, for its connection ends.

use super::inbox::Line;

/// What the bytes of a body so far make of the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// Within the size of a chunk, of which this was said.
    Size(u64),
    /// Within the rest of the line that said this size.
    Extension(u64),
    /// So many bytes belong to a chunk or to the end of its line.
    Data(u64),
    /// After the last chunk.
    Trailers(Line),
    /// The body is whole, and nothing came after it.
    End,
    /// Something came after it, or it is not chunked.
    Unsure,
}

impl Default for Chunks {
    fn default() -> Self {
        Self::Size(0)
    }
}

impl Chunks {
    /// These bytes have come.
    pub fn received(&mut self, mut bytes: &[u8]) {
        while *self != Self::Unsure
            && let Some((byte, rest)) = bytes.split_first()
        {
            bytes = rest;
            *self = match *self {
                Self::Data(left) => {
                    let (left, skipped) = (left - 1, usize::try_from(left - 1).unwrap_or(usize::MAX).min(rest.len()));
                    bytes = &rest[skipped..];
                    let left = left - skipped as u64;
                    if left > 0 { Self::Data(left) } else { Self::Size(0) }
                }
                size => size.after(*byte),
            };
        }
    }

    /// The state after a byte that is no data.
    fn after(self, byte: u8) -> Self {
        match (self, byte) {
            (Self::Size(0) | Self::Extension(0), b'\n') => Self::Trailers(Line::Begins),
            (Self::Size(size) | Self::Extension(size), b'\n') => size.checked_add(2).map_or(Self::Unsure, Self::Data),
            (Self::Size(size), b'\r' | b';' | b' ' | b'\t') | (Self::Extension(size), _) => Self::Extension(size),
            (Self::Size(size), _) => {
                let digit = char::from(byte).to_digit(16);
                let size = digit.and_then(|digit| size.checked_mul(16)?.checked_add(digit.into()));
                size.map_or(Self::Unsure, Self::Size)
            }
            (Self::Trailers(mut line), _) => {
                if line.head_end(&[byte]).is_some() {
                    Self::End
                } else {
                    Self::Trailers(line)
                }
            }
            (Self::Data(_) | Self::End | Self::Unsure, _) => Self::Unsure,
        }
    }
}
