use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::{Answer, answer, client};

const ME: &str = "me";

fn held_by(holder: &str, transitions: i32) -> LeaseSpec {
    LeaseSpec {
        holder_identity: Some(holder.into()),
        lease_transitions: Some(transitions),
        lease_duration_seconds: Some(15),
        ..LeaseSpec::default()
    }
}

#[test]
fn a_foreign_hold_is_taken_only_after_its_whole_duration_without_a_change() {
    let (mut seen, start) = (Seen::default(), Instant::now());
    let after = |seconds| start + Duration::from_secs(seconds);
    assert_eq!(seen.step(Some(&held_by("other", 1)), ME, false, start), Step::Wait);
    assert_eq!(seen.step(Some(&held_by("other", 1)), ME, false, after(14)), Step::Wait);
    assert_eq!(seen.step(Some(&held_by("other", 2)), ME, false, after(15)), Step::Wait, "it has changed");
    assert_eq!(seen.step(Some(&held_by("other", 2)), ME, false, after(29)), Step::Wait);
    assert_eq!(seen.step(Some(&held_by("other", 2)), ME, false, after(30)), Step::Take);
}

#[test]
fn a_holder_is_silent_when_it_has_not_renewed_for_seconds() {
    let (mut seen, start) = (Seen::default(), Instant::now());
    let after = |seconds| start + Duration::from_secs(seconds);
    seen.step(Some(&held_by("other", 1)), ME, false, start);
    assert!(!seen.holder_silent(start, after(4)), "whoever has just begun does not judge");
    assert!(seen.holder_silent(start, after(5)));
    seen.step(Some(&held_by("other", 2)), ME, false, after(6));
    assert!(!seen.holder_silent(start, after(8)));
    assert!(seen.holder_silent(start, after(9)));
}

#[test]
fn a_free_lease_is_taken_and_the_own_one_renewed() {
    let (mut seen, now) = (Seen::default(), Instant::now());
    assert_eq!(seen.step(None, ME, false, now), Step::Create);
    assert_eq!(seen.step(Some(&LeaseSpec::default()), ME, false, now), Step::Take);
    assert_eq!(seen.step(Some(&held_by("", 1)), ME, false, now), Step::Take);
    assert_eq!(seen.step(Some(&held_by(ME, 1)), ME, true, now), Step::Renew);
    assert_eq!(seen.step(Some(&held_by(ME, 1)), ME, false, now), Step::Take, "a restarted container leads anew");
}

/// One Lease behind an API server that checks resourceVersions.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<Option<Lease>>>);

impl Store {
    fn client(&self) -> Client {
        let store = self.clone();
        client(move |request, body| store.answer(&request, &body))
    }

    fn answer(&self, request: &http::request::Parts, body: &[u8]) -> Answer {
        let mut stored = self.0.lock().unwrap();
        let version = |lease: &Lease| lease.metadata.resource_version.clone();
        match request.method.as_str() {
            "GET" => stored.as_ref().map_or_else(|| answer(404, "NotFound"), |lease| answer(200, lease)),
            "POST" if stored.is_some() => answer(409, "AlreadyExists"),
            method => {
                let mut lease: Lease = serde_json::from_slice(body).unwrap();
                if method == "PUT" && stored.as_ref().and_then(version) != version(&lease) {
                    return answer(409, "Conflict");
                }
                let number: u64 = version(&lease).map_or(0, |version| version.parse().unwrap());
                lease.metadata.resource_version = Some((number + 1).to_string());
                *stored = Some(lease);
                answer(200, stored.as_ref().unwrap())
            }
        }
    }

    fn holder(&self) -> Option<String> {
        self.0.lock().unwrap().as_ref()?.spec.as_ref()?.holder_identity.clone()
    }

    fn election(&self, identity: &str) -> Election {
        Election::new(self.client(), "n", "lease", identity)
    }
}

#[tokio::test]
async fn one_leads_until_it_gives_the_lease_back() {
    let store = Store::default();
    let (first, mut second) = (store.election("first"), store.election("second"));
    let (mut first_state, second_state) = (first.state(), second.state());
    let end = CancellationToken::new();
    let running = tokio::spawn(first.run(end.clone()));
    let state = *first_state.wait_for(|state| state.leader).await.unwrap();
    assert_eq!(state.epoch, 1);
    assert!(state.valid_until <= Instant::now() + CERTAIN);

    second.round().await.unwrap();
    assert!(!second_state.borrow().leader);

    end.cancel();
    running.await.unwrap();
    assert_eq!(store.holder(), None);
    second.round().await.unwrap();
    assert_eq!((second_state.borrow().leader, second_state.borrow().epoch), (true, 2));
}

#[tokio::test]
async fn a_lease_taken_away_is_noticed_and_a_deleted_one_keeps_the_epoch_rising() {
    let store = Store::default();
    let mut election = store.election(ME);
    let state = election.state();
    election.round().await.unwrap();
    assert!(state.borrow().leader);

    store.0.lock().unwrap().as_mut().unwrap().spec = Some(held_by("other", 7));
    election.round().await.unwrap();
    assert!(!state.borrow().leader);

    *store.0.lock().unwrap() = None;
    election.round().await.unwrap();
    assert_eq!((state.borrow().leader, state.borrow().epoch), (true, 8));
}

#[tokio::test]
async fn a_renewal_extends_the_hold_and_is_no_new_term() {
    let store = Store::default();
    let mut election = store.election(ME);
    let state = election.state();
    election.round().await.unwrap();
    let before = *state.borrow();
    election.round().await.unwrap();
    let after = *state.borrow();
    assert_eq!((after.since, after.epoch), (before.since, before.epoch));
    assert!(after.valid_until > before.valid_until);
}
