# Outlives the process that started a server: when the pipe from there ends, however that came about, it stops the
# server whose process id is in the file $2, and removes the folder $1.
trap '' HUP INT QUIT TERM PIPE
folder=$1 pid_file=$2

while read -r _; do :; done

read -r pid < "$pid_file"
if [ -n "$pid" ] && kill -s QUIT "$pid"; then
    tries=0
    # The file goes when the server has ended; the process may linger as a zombie that nobody fetches.
    while [ -e "$pid_file" ] && kill -s 0 "$pid"; do
        tries=$((tries + 1))
        # Its children with it: one that is busy would not notice that it is alone.
        # shellcheck disable=SC2046
        [ "$tries" != 100 ] || kill -s KILL "$pid" $(ps -o pid= --ppid "$pid")
        [ "$tries" != 120 ] || break
        sleep 0.05
    done
fi

# Again and again, since a program that was just being started may still write there.
tries=0
while ! rm -rf "$folder" || [ -e "$folder" ]; do
    tries=$((tries + 1))
    [ "$tries" != 50 ] || break
    sleep 0.1
done
