//! Each kind of question, and answers good and bad.

use std::convert::Infallible;

use hyper::service::service_fn;
use rcgen::{CertificateParams, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use super::*;

const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

async fn asked(action: &ProbeAction) -> Result<(), Fault> {
    let second = Duration::from_secs(5);
    tokio::time::timeout(second, ask(Dialer::default(), LOCAL, action, second)).await.map_err(|_| Fault::Timeout)?
}

fn get(port: u16, path: &str) -> ProbeAction {
    ProbeAction::Http { tls: false, port, path: path.into(), headers: vec![] }
}

/// Answers every request with what `script` makes of it.
async fn server(script: impl Fn(&str) -> String + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            let answer = script(&String::from_utf8_lossy(&request[..length]));
            drop(stream.write_all(answer.as_bytes()).await);
        }
    });
    port
}

fn answer(status: u16, location: &str) -> String {
    format!("HTTP/1.1 {status} X\r\n{location}Content-Length: 0\r\n\r\n")
}

#[tokio::test]
async fn statuses_from_200_to_399_are_good() {
    for (status, good) in [(200, true), (204, true), (304, true), (399, true), (400, false), (404, false), (503, false)]
    {
        let port = server(move |_| answer(status, "")).await;
        assert_eq!(asked(&get(port, "/")).await.is_ok(), good, "{status}");
    }
}

#[tokio::test]
async fn a_request_looks_like_kubelets_and_takes_headers_of_the_probe() {
    let port = server(|request| {
        let lower = request.to_lowercase();
        let good = request.starts_with("GET /ready?full=1 HTTP/1.1\r\n")
            && lower.contains("\r\nuser-agent: kube-probe/")
            && lower.contains("\r\naccept: */*\r\n")
            && lower.contains("\r\nconnection: close\r\n")
            && lower.contains("\r\nhost: 127.0.0.1:");
        answer(if good { 200 } else { 500 }, "")
    })
    .await;
    asked(&get(port, "/ready?full=1")).await.unwrap();
    asked(&get(port, "ready?full=1")).await.unwrap();

    let port = server(|request| {
        let lower = request.to_lowercase();
        let good = lower.contains("\r\nuser-agent: mine\r\n")
            && lower.contains("\r\nhost: shop.example\r\n")
            && !lower.contains("\r\naccept:");
        answer(if good { 200 } else { 500 }, "")
    })
    .await;
    let headers = [("User-Agent", "mine"), ("Host", "shop.example"), ("Accept", "")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    asked(&ProbeAction::Http { tls: false, port, path: "/".into(), headers }).await.unwrap();
}

#[tokio::test]
async fn redirects_are_followed_on_the_same_host_and_good_to_another() {
    let port = server(|request| match request.split(' ').nth(1) {
        Some("/local") => answer(302, "Location: /bad\r\n"),
        Some("/good") => answer(307, "Location: /end\r\n"),
        Some("/end") => answer(200, ""),
        Some("/away") => answer(301, "Location: https://login.example/\r\n"),
        Some("/circle") => answer(302, "Location: /circle\r\n"),
        _ => answer(500, ""),
    })
    .await;
    assert!(matches!(asked(&get(port, "/local")).await, Err(Fault::Status(status)) if status == 500));
    asked(&get(port, "/good")).await.unwrap();
    asked(&get(port, "/away")).await.unwrap();
    assert!(matches!(asked(&get(port, "/circle")).await, Err(Fault::Redirect)));
    let port = server(move |request| {
        let here = format!("Location: http://127.0.0.1:{port}/end\r\n");
        answer(if request.starts_with("GET /x ") { 302 } else { 500 }, &here)
    })
    .await;
    asked(&get(port, "/x")).await.unwrap();
}

#[tokio::test]
async fn a_port_that_is_closed_or_a_server_that_breaks_off_is_not_ready() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    assert!(matches!(asked(&ProbeAction::Tcp { port: closed }).await, Err(Fault::Io(_))));
    assert!(matches!(asked(&get(closed, "/")).await, Err(Fault::Io(_))));
    let rude = server(|_| String::new()).await;
    assert!(matches!(asked(&get(rude, "/")).await, Err(Fault::Http(_))));
    asked(&ProbeAction::Tcp { port: rude }).await.unwrap();
    let grpc = ProbeAction::Grpc { port: rude, service: String::new() };
    assert!(asked(&grpc).await.is_err());
    assert!(matches!(asked(&ProbeAction::Unknown).await, Err(Fault::Unknown)));
}

#[tokio::test]
async fn any_certificate_is_taken() {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["elsewhere.example".to_owned()]).unwrap().self_signed(&key).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await.unwrap();
        let mut request = [0; 1024];
        let _length = stream.read(&mut request).await.unwrap();
        stream.write_all(answer(200, "").as_bytes()).await.unwrap();
        drop(stream.shutdown().await);
    });
    asked(&ProbeAction::Http { tls: true, port, path: "/".into(), headers: vec![] }).await.unwrap();
}

/// A health service that knows `shop` as serving and answers everything else with `other`.
async fn health(other: u8) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(move |request: Request<Incoming>| async move {
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                assert_eq!(request.headers()[CONTENT_TYPE], "application/grpc");
                let question = request.into_body().collect().await.unwrap().to_bytes();
                let status = if question[..] == [0, 0, 0, 0, 6, 10, 4, b's', b'h', b'o', b'p'] { 1 } else { other };
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                let body = Full::new(Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 8, status]));
                Ok::<_, Infallible>(Response::new(body.with_trailers(async move { Some(Ok(trailers)) })))
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
        }
    });
    port
}

#[tokio::test]
async fn a_grpc_server_must_say_that_the_service_is_serving() {
    let ask = |port, service: &str| {
        let action = ProbeAction::Grpc { port, service: service.to_owned() };
        async move { asked(&action).await }
    };
    let not_serving = health(2).await;
    ask(not_serving, "shop").await.unwrap();
    assert!(matches!(ask(not_serving, "").await, Err(Fault::NotServing)));
    ask(health(1).await, "").await.unwrap();
}

#[test]
fn a_long_name_has_a_long_length() {
    let request = health_request(&"x".repeat(300));
    assert_eq!(request[..8], [0, 0, 0, 1, 47, 10, 0xac, 2]);
    assert_eq!(request.len(), 5 + 303);
}
