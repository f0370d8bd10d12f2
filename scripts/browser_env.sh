#!/usr/bin/env bash
# Makes .browser, a headless Chromium of Debian's that the tests marked `browser` look at reports with. Packages are
# unpacked there and nothing is installed, so root is not needed; what the system already has is used as it is.
# Elsewhere than on Debian or Ubuntu with such a package, name a Chrome or Chromium in CHROMIUM.
# Usage: bash scripts/browser_env.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-.browser}
package=chromium-headless-shell
if ! command -v apt-get > /dev/null || ! apt-cache show "$package" > /dev/null 2>&1; then
    echo "error: apt knows no $package here (\`apt-get update\` may help); name a Chrome or Chromium in CHROMIUM" >&2
    exit 2
fi
mkdir -p "$folder/debs"
# What apt would install beside it, without doing so; a font, since text without one has no width.
apt-get --simulate --no-install-recommends install "$package" fonts-dejavu-core 2> /dev/null \
    | awk '$1 == "Inst" {print $2}' > "$folder/packages.txt"
(cd "$folder/debs" && xargs --no-run-if-empty apt-get download --quiet < ../packages.txt)
for deb in "$folder"/debs/*.deb; do
    [ -e "$deb" ] && dpkg-deb --extract "$deb" "$folder/root"
done
rm -r "$folder/debs"

root=$(realpath "$folder/root")
shell=$root/usr/lib/chromium/$package
[ -x "$shell" ] || shell=$(command -v "$package")
# Some libraries lie in folders of their own, which their packages' owners find by an RPATH of the root.
libraries=$(find "$root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd :)
mkdir -p "$folder/bin"
cat > "$folder/bin/chromium" <<SH
#!/usr/bin/env bash
export LD_LIBRARY_PATH=$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
exec "$shell" "\$@"
SH
chmod +x "$folder/bin/chromium"
"$folder/bin/chromium" --version
