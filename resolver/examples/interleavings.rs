//! What connections of one Service share, under the orders in which threads can meet: the code of the resolver, with the
//! locks and counts of Shuttle, which decides who runs next. It fails by panicking, with the schedule that broke it.
//!
//! An example and no test, for unit tests in the same files need real locks. `cargo xtask test --only unit` runs it.

#![allow(dead_code, unreachable_pub, reason = "modules of the resolver, of which not all is looked at here")]
#![allow(clippy::unwrap_used, reason = "it fails by panicking")]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Instant;

use elasti_resolver::{breaker, hold, metrics, report, wake};
use shuttle::future::block_on;
use shuttle::rand::Rng;
use shuttle::thread;

#[path = "../src/balance.rs"]
mod balance;
#[path = "../src/ports.rs"]
mod ports;
#[path = "../src/service.rs"]
mod service;

/// In place of the resolver's own.
mod sync {
    pub(crate) use shuttle::sync::atomic::{AtomicU32, AtomicU64};
    pub(crate) use shuttle::sync::{Mutex, MutexGuard};
}

use crate::balance::Load;
use crate::ports::PortView;
use crate::report::Board;
use crate::service::{Service, View};

/// Orders that are tried, by chance, of each.
const ORDERS: usize = 5_000;

const CLIENT: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn main() {
    let checks: [(&str, fn()); 5] = [
        ("operators are told last what is held last", operators_are_told_last_what_is_held_last),
        ("no more are held than may be", no_more_are_held_than_may_be),
        ("who is held at the moment of a wake hears of it", who_is_held_at_the_moment_of_a_wake_hears_of_it),
        ("every place is given to somebody who waits", every_place_is_given_to_somebody_who_waits),
        ("a place is not lost with one who gives up", a_place_is_not_lost_with_one_who_gives_up),
    ];
    for (name, check) in checks {
        // Ties between backends are broken by chance; a schedule must lead to the same end each time.
        let check = move || {
            fastrand::seed(0);
            check();
        };
        shuttle::check_random(check, ORDERS);
        shuttle::check_pct(check, ORDERS, 3);
        eprintln!("{name}: ok");
    }
}

fn service(board: &Board) -> Arc<Service> {
    let metrics = metrics::Metrics::new(&prometheus::Registry::new()).unwrap();
    Arc::new(Service::new("n", "s", metrics, board.news()))
}

/// A connection goes while others come, and one stays or none does. A stream looks when it is told to, and not otherwise.
fn operators_are_told_last_what_is_held_last() {
    let board = Board::default();
    let service = service(&board);
    let mut news = board.follow();
    let stays = shuttle::rand::thread_rng().gen_bool(0.5);
    let coming: Vec<_> = (0..3)
        .map(|number| {
            let service = Arc::clone(&service);
            thread::spawn(move || service.hold(Instant::now(), 9).ok().filter(|_| stays && number == 0))
        })
        .collect();
    let stream = {
        let service = Arc::clone(&service);
        thread::spawn(move || {
            let mut told = 0;
            for _ in 0..3 {
                if news.has_changed().unwrap() {
                    news.mark_unchanged();
                    told = service.traffic().held;
                }
                thread::yield_now();
            }
            (news, told)
        })
    };
    let held: Vec<_> = coming.into_iter().filter_map(|thread| thread.join().unwrap()).collect();
    let (news, mut told) = stream.join().unwrap();
    if news.has_changed().unwrap() {
        told = service.traffic().held;
    }
    // More or fewer than one waits for the next heartbeat.
    assert_eq!(told > 0, !held.is_empty());
}

fn no_more_are_held_than_may_be() {
    let service = service(&Board::default());
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let service = Arc::clone(&service);
            thread::spawn(move || {
                let held = service.hold(Instant::now(), 1);
                assert!(service.traffic().held <= 1);
                if let Ok(held) = held {
                    held.reached();
                    let forwarding = service.forward(CLIENT);
                    assert!(service.traffic().forwarding > 0);
                    drop(forwarding);
                    return 1;
                }
                0
            })
        })
        .collect();
    let served: u32 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert!(served > 0);
    let traffic = service.traffic();
    assert_eq!((traffic.held, traffic.forwarding), (0, 0));
}

/// As a connection does it: follow, look, be held, wait.
fn who_is_held_at_the_moment_of_a_wake_hears_of_it() {
    const PORT: u16 = 1;
    let service = service(&Board::default());
    let view = |targets: &[&str]| {
        let targets = targets.iter().map(|target| target.parse().unwrap()).collect();
        View { ports: [(PORT, PortView { targets, ..PortView::default() })].into(), ..View::default() }
    };
    service.set(view(&[]));
    let connection = {
        let service = Arc::clone(&service);
        thread::spawn(move || {
            let mut views = service.views();
            let reachable = views.borrow_and_update().reachable(PORT);
            let held = (!reachable).then(|| service.hold(Instant::now(), 9).unwrap());
            block_on(async { drop(views.wait_for(|view| view.reachable(PORT)).await.unwrap()) });
            held.into_iter().for_each(service::Held::reached);
        })
    };
    let other = {
        let service = Arc::clone(&service);
        thread::spawn(move || drop(service.hold(Instant::now(), 9)))
    };
    service.set(view(&["10.0.0.1:80"]));
    connection.join().unwrap();
    other.join().unwrap();
    assert_eq!(service.traffic().held, 0);
}

/// Two places become free while two connections come that can each use one of them. Who waits for ever is a deadlock.
fn every_place_is_given_to_somebody_who_waits() {
    let load = Arc::new(Load::default());
    let backends = ["10.0.0.1:80".parse().unwrap(), "10.0.0.1:443".parse().unwrap()];
    let taken: Vec<_> = backends.iter().map(|backend| load.take(&[*backend], Some(1)).unwrap()).collect();
    let mut threads: Vec<_> = taken.into_iter().map(|place| thread::spawn(move || drop(place))).collect();
    for backend in backends {
        let load = Arc::clone(&load);
        threads.push(thread::spawn(move || {
            let place = block_on(load.place(&[backend], Some(1)));
            assert_eq!(place.backend(), backend);
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(load.open(), 0);
}

fn a_place_is_not_lost_with_one_who_gives_up() {
    let load = Arc::new(Load::default());
    let backends = ["10.0.0.1:80".parse().unwrap()];
    let taken = load.take(&backends, Some(1)).unwrap();
    let gives_up = {
        let load = Arc::clone(&load);
        thread::spawn(move || {
            let place = load.place(&backends, Some(1));
            drop(pin!(place).poll(&mut Context::from_waker(Waker::noop())));
        })
    };
    let waits = {
        let load = Arc::clone(&load);
        thread::spawn(move || drop(block_on(load.place(&backends, Some(1)))))
    };
    drop(taken);
    gives_up.join().unwrap();
    waits.join().unwrap();
    assert_eq!(load.open(), 0);
}
