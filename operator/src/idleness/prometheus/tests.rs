//! What Prometheus answers and how it is asked, against servers of our own.

use super::*;

fn answer(result_type: &str, result: &serde_json::Value) -> Result<f64, String> {
    let body = serde_json::json!({"status": "success", "data": {"resultType": result_type, "result": result}});
    single_value(&serde_json::to_vec(&body).unwrap())
}

/// Keeps out B38: another Service's answer is taken for one that is missing.
#[test]
fn only_one_finite_number_is_an_answer() {
    let series = |value: &str| serde_json::json!({"metric": {}, "value": [1.0, value]});
    assert_eq!(answer("vector", &serde_json::json!([series("0.25")])), Ok(0.25));
    assert_eq!(answer("scalar", &serde_json::json!([1.0, "2"])), Ok(2.0));
    for bad in ["NaN", "+Inf", "-Inf", "", "x"] {
        assert!(answer("vector", &serde_json::json!([series(bad)])).is_err(), "{bad}");
    }
    assert!(answer("vector", &serde_json::json!([])).unwrap_err().contains("0 series"));
    assert!(answer("vector", &serde_json::json!([series("1"), series("1")])).unwrap_err().contains("2 series"));
    assert!(single_value(b"{}").is_err());
}

#[test]
fn below_the_threshold_is_idle() {
    assert_eq!(judge(0.4, 0.5), Verdict::Idle);
    assert_eq!(judge(0.5, 0.5), Verdict::Busy);
    assert_eq!(judge(-1.0, 0.5), Verdict::Busy);
}

#[test]
fn queries_are_escaped() {
    assert_eq!(escape("sum(rate(x[1m])) + 1"), "sum%28rate%28x%5B1m%5D%29%29%20%2B%201");
}

/// A server that answers every query with 1, and tells of the Authorization header of each.
async fn server(acceptor: Option<tokio_rustls::TlsAcceptor>) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (told, heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, told) = (acceptor.clone(), told.clone());
            tokio::spawn(async move {
                match acceptor {
                    None => answer_one(stream, &told).await,
                    Some(acceptor) => match acceptor.accept(stream).await {
                        Ok(stream) => answer_one(stream, &told).await,
                        Err(error) => drop(told.send(error.to_string())),
                    },
                }
            });
        }
    });
    (port, heard)
}

async fn answer_one<S>(mut stream: S, told: &tokio::sync::mpsc::UnboundedSender<String>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut request = vec![0; 4096];
    let length = stream.read(&mut request).await.unwrap_or(0);
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    let header = request.lines().find_map(|line| line.strip_prefix("authorization: "));
    told.send(header.unwrap_or("none").to_owned()).unwrap();
    let body = r#"{"status":"success","data":{"resultType":"scalar","result":[1,"1"]}}"#;
    let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
}

/// An API server that has one Secret, in the namespace `shop`.
fn prometheus(defaults: Defaults) -> Prometheus {
    let client = crate::testing::client(|request, _| match request.uri.path() {
        "/api/v1/namespaces/shop/secrets/credentials" => {
            let data = serde_json::json!({"header": "QmVhcmVyIHMzY3JldAo="});
            crate::testing::answer(200, serde_json::json!({"apiVersion": "v1", "kind": "Secret", "data": data}))
        }
        "/api/v1/namespaces/shop/secrets/hidden" => crate::testing::answer(403, "Forbidden"),
        _ => crate::testing::answer(404, "NotFound"),
    });
    Prometheus::new(defaults, client)
}

fn asking(port: u16, more: &serde_json::Value) -> PrometheusMetadata {
    let address = format!("http://127.0.0.1:{port}");
    let mut metadata = serde_json::json!({"serverAddress": address, "query": "q", "threshold": 0.5});
    metadata.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(metadata).unwrap()
}

#[tokio::test]
async fn the_operators_authorization_goes_to_its_own_server_only() {
    let ((own, mut told_own), (other, mut told_other)) = (server(None).await, server(None).await);
    let defaults = Defaults {
        server_address: Some(format!("http://127.0.0.1:{own}/")),
        authorization: Some("Bearer of-the-operator".into()),
    };
    let prometheus = prometheus(defaults);
    for (port, told, expected) in [(own, &mut told_own, "Bearer of-the-operator"), (other, &mut told_other, "none")] {
        let verdict = prometheus.ask("shop", &asking(port, &serde_json::json!({})), Duration::from_mins(1)).await;
        assert_eq!((verdict, told.recv().await.unwrap().as_str()), (Verdict::Busy, expected));
    }
}

#[tokio::test]
async fn an_authorization_comes_from_a_header_or_a_secret_of_the_same_namespace() {
    let (port, mut told) = server(None).await;
    let prometheus = prometheus(Defaults::default());
    let secret = |name: &str, key: &str| serde_json::json!({"authorizationSecret": {"name": name, "key": key}});
    for (more, expected) in [
        (serde_json::json!({"headers": {"Authorization": "Basic abc"}}), "Basic abc"),
        (secret("credentials", "header"), "Bearer s3cret"),
    ] {
        prometheus.ask("shop", &asking(port, &more), Duration::from_mins(1)).await;
        assert_eq!(
            (told.recv().await.unwrap(), told.recv().await.unwrap()),
            (expected.to_owned(), expected.to_owned())
        );
    }
    for (namespace, more, word) in [
        ("shop", secret("credentials", "other"), "no key other"),
        ("shop", secret("hidden", "header"), "grant its ServiceAccount"),
        ("elsewhere", secret("credentials", "header"), "no Secret elsewhere/credentials"),
    ] {
        let verdict = prometheus.ask(namespace, &asking(port, &more), Duration::from_mins(1)).await;
        assert!(matches!(&verdict, Verdict::Unknown(why) if why.contains(word)), "{verdict:?}");
    }
    assert!(told.try_recv().is_err(), "nothing is asked without its authorization");
}

#[tokio::test]
async fn a_certificate_is_taken_from_the_named_authority_or_from_anybody_if_told_so() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let (port, _told) = server(Some(std::sync::Arc::new(config).into())).await;
    let prometheus = prometheus(Defaults::default());
    let stranger = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert.pem();
    for (tls, trusted) in [
        (serde_json::json!({"tls": {"ca": made.cert.pem()}}), true),
        (serde_json::json!({"tls": {"insecureSkipVerify": true}}), true),
        (serde_json::json!({"tls": {"ca": stranger}}), false),
        (serde_json::json!({}), false),
    ] {
        let mut metadata = asking(port, &tls);
        metadata.server_address = Some(format!("https://localhost:{port}"));
        let verdict = prometheus.ask("shop", &metadata, Duration::from_mins(1)).await;
        assert_eq!(verdict == Verdict::Busy, trusted, "{tls}: {verdict:?}");
        assert!(trusted || matches!(verdict, Verdict::Unknown(_)));
    }
}

/// A server that takes every connection and answers none; the most that were open at once.
async fn dead_server() -> (u16, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let told = Arc::clone(&most);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let open = Arc::clone(&open);
            told.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::spawn(async move {
                drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (port, most)
}

#[tokio::test]
async fn b37_ten_thousand_triggers_of_a_dead_server_delay_nobody_who_asks_another() {
    let ((dead, most), (alive, mut told)) = (dead_server().await, server(None).await);
    let prometheus = prometheus(Defaults::default());
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..10_000 {
        let (prometheus, metadata) = (prometheus.clone(), asking(dead, &serde_json::json!({})));
        waiting.spawn(async move { prometheus.ask("shop", &metadata, Duration::from_mins(1)).await });
    }
    // Within its own time: an answer that is late is none.
    let verdict = prometheus.ask("shop", &asking(alive, &serde_json::json!({})), Duration::from_mins(1)).await;
    assert_eq!((verdict, told.recv().await.unwrap().as_str()), (Verdict::Busy, "none"));
    let first = waiting.join_next().await.unwrap().unwrap();
    let names_it = |why: &str| why.contains(&format!("http://127.0.0.1:{dead}"));
    assert!(matches!(&first, Verdict::Unknown(why) if names_it(why)), "{first:?}");
    let most = most.load(std::sync::atomic::Ordering::SeqCst);
    assert!((1..=2 * PLACES).contains(&most), "{most} connections at once");
}

/// Found by Debian's Prometheus: a cooldown of 10 s had "0 series" in it unless it was asked at a full minute.
#[test]
fn each_cooldown_has_steps_at_which_the_uptime_is_looked_up() {
    let query = |seconds| uptime("a", Duration::from_secs(seconds));
    assert_eq!(query(10), "min_over_time((max(up{a}) or vector(0))[10s:1s])");
    assert!(query(900).ends_with("[900s:45s])") && query(604_800).ends_with("[604800s:60s])"));
    assert!(query(1).ends_with("[1s:1s])"));
}
