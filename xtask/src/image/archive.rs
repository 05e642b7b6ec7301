//! One image as bytes: layer, configuration and manifest of the OCI image specification, and the archive around them.
//!
//! Everything is a function of its arguments: no time, owner or order of this machine gets in.

use std::io::Write;

use anyhow::Result;
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// So that tools which look a user up find the ones that the programs run as.
const PASSWD: &str = "\
root:x:0:0:root:/:/sbin/nologin
nobody:x:65534:65534:nobody:/:/sbin/nologin
nonroot:x:65532:65532:nonroot:/:/sbin/nologin
";

/// An image of one program.
pub(super) struct Image {
    /// The files, as tar in gzip.
    pub(super) layer: Vec<u8>,
    /// What runs, and as whom; JSON.
    pub(super) config: Vec<u8>,
    /// Names the two by digest; JSON.
    pub(super) manifest: Vec<u8>,
    /// Bytes of the unpacked layer.
    pub(super) unpacked: usize,
}

impl Image {
    /// An image with the program at `/<name>`.
    pub(super) fn new(name: &str, binary: &[u8], user: &str) -> Result<Self> {
        let files = files(name, binary)?;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&files)?;
        let layer = gzip.finish()?;
        let config = serde_json::to_vec(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": [format!("/{name}")], "User": user, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [digest(&files)]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": [descriptor(LAYER, &layer)],
        }))?;
        Ok(Self { layer, config, manifest, unpacked: files.len() })
    }

    /// The image as a tar of an OCI image layout. containerd imports it under `reference`, which must be whole:
    /// `docker.io/elasti/elasti-operator:dev`.
    pub(super) fn archive(&self, reference: &str) -> Result<Vec<u8>> {
        let mut manifest = descriptor(MANIFEST, &self.manifest);
        manifest["platform"] = json!({"architecture": architecture(), "os": "linux"});
        // containerd takes the first for the whole name; others look for the tag in the second.
        manifest["annotations"] = json!({
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference.rsplit(':').next(),
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });
        let mut tar = Tar::new();
        tar.file("oci-layout", 0o644, json!({"imageLayoutVersion": "1.0.0"}).to_string().as_bytes())?;
        tar.file("index.json", 0o644, index.to_string().as_bytes())?;
        for blob in [&self.config, &self.layer, &self.manifest] {
            tar.file(&format!("blobs/{}", digest(blob).replace(':', "/")), 0o644, blob)?;
        }
        tar.finish()
    }
}

fn files(name: &str, binary: &[u8]) -> Result<Vec<u8>> {
    let mut tar = Tar::new();
    tar.directory("etc/")?;
    tar.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    for directory in ["etc/ssl/", "etc/ssl/certs/"] {
        tar.directory(directory)?;
    }
    // A Prometheus may be anywhere behind a public certificate. Mozilla's list comes by Cargo.lock; the one of this machine
    // would make images differ, and may hold CAs that only its owner trusts.
    let roots: Vec<pem::Pem> = webpki_root_certs::TLS_SERVER_ROOT_CERTS
        .iter()
        .map(|certificate| pem::Pem::new("CERTIFICATE", certificate.to_vec()))
        .collect();
    tar.file("etc/ssl/certs/ca-certificates.crt", 0o644, pem::encode_many(&roots).as_bytes())?;
    tar.file(name, 0o755, binary)?;
    tar.finish()
}

/// As the Go language calls it, and so do images.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

fn digest(blob: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(blob))
}

/// A tar whose entries belong to root and to no time.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn directory(&mut self, path: &str) -> Result<()> {
        self.entry(tar::EntryType::Directory, path, 0o755, &[])
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(tar::EntryType::Regular, path, mode, content)
    }

    fn entry(&mut self, kind: tar::EntryType, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        Ok(self.0.append_data(&mut header, path, content)?)
    }

    fn finish(self) -> Result<Vec<u8>> {
        Ok(self.0.into_inner()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read;

    const REFERENCE: &str = "docker.io/elasti/elasti-operator:v1";

    fn image() -> Image {
        Image::new("elasti-operator", b"program", "65532:65532").unwrap()
    }

    fn entries(tar: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut archive = tar::Archive::new(tar);
        let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.unwrap();
            let mut content = vec![];
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), (entry.header().mode().unwrap(), content))
        };
        archive.entries().unwrap().map(read).collect()
    }

    #[test]
    fn the_same_program_gives_the_same_bytes() {
        assert_eq!(image().archive(REFERENCE).unwrap(), image().archive(REFERENCE).unwrap());
    }

    #[test]
    fn every_blob_is_where_its_digest_says() {
        let archive = entries(&image().archive(REFERENCE).unwrap());
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap();
            let (_, content) = &archive[&format!("blobs/{}", digest.replace(':', "/"))];
            assert_eq!(super::digest(content), digest);
            assert_eq!(descriptor["size"], content.len());
            content.clone()
        };
        let index: Value = serde_json::from_slice(&archive["index.json"].1).unwrap();
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], REFERENCE);
        assert_eq!(index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"], "v1");
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        let mut files = vec![];
        flate2::read::GzDecoder::new(&*blob(&manifest["layers"][0])).read_to_end(&mut files).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], super::digest(&files));
        assert_eq!(config["config"]["Entrypoint"], json!(["/elasti-operator"]));
        assert_eq!(config["config"]["User"], "65532:65532");
        assert_eq!(archive.len(), 5, "layout, index and three blobs");
    }

    #[test]
    fn the_layer_has_the_program_users_and_certificates_alone() {
        let files = entries(&files("elasti-operator", b"program").unwrap());
        assert_eq!(files["elasti-operator"], (0o755, b"program".to_vec()));
        let certificates = String::from_utf8_lossy(&files["etc/ssl/certs/ca-certificates.crt"].1);
        assert!(certificates.matches("-----BEGIN CERTIFICATE-----").count() > 100, "{certificates}");
        let names: Vec<&str> = files.keys().map(|name| name.trim_end_matches('/')).collect();
        let wanted =
            ["elasti-operator", "etc", "etc/passwd", "etc/ssl", "etc/ssl/certs", "etc/ssl/certs/ca-certificates.crt"];
        assert_eq!(names, wanted);
    }
}
